"""[privacy]: what a run promises about the data it was trained on."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedlora.config.section import Positive, Section

Above0 = Annotated[float, Field(gt=0.0)]


class PrivacySection(Section):
    """Differential privacy by adding or removing one unit. Without this table: none."""

    unit: Literal["record", "client"] = "record"
    """record: every client trains by DP-SGD, and what it sends is private to one of its
    examples, from everybody else, the server included. client: the server clips and noises the
    sum of updates; private to one client's whole data from everybody but the server."""
    epsilon: Above0 | None = None
    """Budget of the whole run. Without `noise_multiplier`, the noise is chosen so that all
    rounds fit; with it, the run ends when the budget is spent."""
    delta: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Failure probability; by default min(1e-5, 1 / (10 n)), n the client's examples (or the
    enrolled clients). It must be below 1 / n."""
    noise_multiplier: Above0 | None = None
    """Standard deviation of the noise in units of the clip norm; by default what `epsilon`
    needs."""
    max_grad_norm: Above0 = 1.0
    """unit = "record": L2 norm that one example's gradient is clipped to."""
    clip_norm: Above0 = 1.0
    """unit = "client": L2 norm that one client's update is clipped to."""
    adaptive_clip: bool = False
    """unit = "client": follow the median of the updates' norms from `clip_norm` on; its noisy
    count is paid for out of the same budget."""
    population: Positive | None = None
    """unit = "client": enrolled clients N; by default those of the simulation. Fixed for the
    run."""
    client_sampling: Literal["poisson", "fixed"] = "poisson"
    """unit = "client": poisson takes each client with probability clients_per_round / N. fixed
    takes a fixed number, which amplifies nothing."""
    planned_rounds: Positive | None = None
    """unit = "record": rounds that a client expects to train in; by default all. A client whose
    budget is spent sits out."""
    noise: Literal["os", "secure", "test"] = "os"
    """os: the device's generator, with a new seed from the operating system for every step.
    secure: AES-CTR. test: from run.seed; NOT PRIVATE, and marked so."""
    per_sample: Literal["auto", "bookkeeping", "hooks"] = "auto"
    """How gradients of single examples are made: from the products that the backward pass
    computes anyway, or by Opacus' hooks. "auto" takes the first where it applies."""
    metrics_noise: Above0 = 30.0
    """metrics = "noisy": standard deviation of the noise in units of one example's share."""
    metrics: Literal["none", "noisy"] = "none"
    """What clients say of their own loss: nothing, or a noisy mean over their validation
    examples, which is paid for out of the same budget."""

    @model_validator(mode="before")
    @classmethod
    def _no_seed(cls, tree: Any) -> Any:
        if isinstance(tree, dict):
            for key in ("seed", "noise_seed"):
                if key in tree:
                    raise ValueError(
                        f"privacy.{key}: the noise has no seed, because whoever knew it could take "
                        "the noise away; remove it (privacy.noise is one of os, secure, test)"
                    )
        return tree

    @model_validator(mode="after")
    def _fits_together(self) -> "PrivacySection":
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError(
                "privacy has neither epsilon nor noise_multiplier; give the budget of the run, "
                "e.g. privacy.epsilon = 8.0"
            )
        return self
