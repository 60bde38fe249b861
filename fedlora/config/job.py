"""Job: everything about one run, the typed tree of a job.toml.

Each field is documented by the string below it; `fedlora init` writes those strings as
comments. A configuration object stops at the builder: classes take plain arguments.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from fedlora.config.privacy import PrivacySection
from fedlora.config.section import Fraction, NonNegative, Positive, Section
from fedlora.config.secure import secure_misfits


def _folder_name(name: str) -> str:
    if not name.isprintable() or not 0 < len(name.encode()) <= 100 or "/" in name:
        raise ValueError(
            f"run.name = {name[:60]!r} is no part of a folder name; give 1 to 100 bytes without "
            "slashes and control characters"
        )
    return name


class ModelSection(Section):
    """The frozen base model."""

    name: str = "builtin:tiny-llama"
    """`builtin:tiny-llama`, a local folder, or a hub id. Models load safetensors only."""
    task: Literal["causal-lm", "sequence-classification", "image-classification"] = "causal-lm"
    """What the model is trained for; a classification task adds a trained head."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the frozen base; the adapter is always float32."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""


class DataSection(Section):
    """Where examples come from and how a row becomes an example."""

    source: Annotated[str, Field(min_length=1)] = "builtin:stdlib"
    """`builtin:stdlib`, a .jsonl/.csv/.tsv/.parquet file, a folder, or a hub id.
    A folder that has one sub-folder per client gives each client its own data; then
    `partition.kind` is "folders". A folder of class folders with pictures is labelled.
    "clients": every client brings its own (`fedlora client --data`); then a classification
    needs `labels`, and only the server reads `test`, if there is one."""
    test: str | None = None
    """A file for the global held-out figures; by default all clients' validation parts."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    format: Literal["auto", "text", "completion", "chat", "labelled-text", "labelled-image"] = (
        "auto"
    )
    """What a row is: plain text, prompt and completion, chat messages, or a labelled text
    or picture. "auto" follows the task and the columns that exist."""
    text: str = "text"
    """Column of plain or labelled text."""
    label: str = "label"
    """Column of the label (a string or an integer)."""
    prompt: str = "prompt"
    """Column of the prompt; the loss does not count it."""
    completion: str = "completion"
    """Column of the completion; the loss counts it alone."""
    messages: str = "messages"
    """Column of a list of {role, content}; the loss counts the assistant's turns."""
    labels: list[str] = []
    """Class names in order; by default those found in the data, sorted. Name them when
    clients run on their own machines, where nobody sees all the data."""
    image: str = "image"
    """Column of a picture (bytes, path, or decoded)."""
    max_length: Positive = 128
    """Longest example in tokens; longer ones are cut and counted."""
    packed: bool = True
    """Plain text only: join documents and cut them into blocks of `max_length`."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Part of each client's rows that is kept for its validation."""
    max_validation: Positive | None = None
    """At most so many validation examples per client."""
    max_rows: Positive | None = None
    """Use only the first rows of the source (after a seeded shuffle)."""


class PartitionSection(Section):
    """How one source is divided among clients (by flwr-datasets, except "folders")."""

    kind: Literal["iid", "dirichlet", "shards", "pathological", "natural", "folders"] = "iid"
    """iid; dirichlet skew over `column`; shards of rows sorted by `column`; a fixed number
    of classes per client; one client per value of `column`; or one sub-folder per client."""
    clients: Annotated[int, Field(ge=0)] = 4
    """Number of clients. For "natural" and "folders" the data decide; then this keeps the
    first so many, by name, and 0 keeps all."""
    column: str | None = None
    """Column that skews or names the clients; by default the label (`area` for the
    builtin data)."""
    alpha: Annotated[float, Field(gt=0.0)] = 0.5
    """Dirichlet concentration; smaller is more skewed."""
    min_size: Positive = 2
    """Fewest rows a Dirichlet client may get."""
    per_client: Positive = 2
    """Shards or classes per client."""


class AdapterSection(Section):
    """What is trained on top of the frozen base."""

    method: str = "lora"
    """lora, rslora, dora, pissa, lora-xs, vera, miss, bone-row or bone-col."""
    rank: Positive = 8
    """Rank r (block size b for bone)."""
    alpha: Annotated[float, Field(gt=0.0)] | None = None
    """Numerator of the scale alpha / r; by default 2 * rank (rank for pissa
    and lora-xs)."""
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    """Names, name endings or regular expressions of the linear layers to adapt.
    "all-linear" is every linear layer but heads and embeddings."""
    heads: list[str] | Literal["auto"] = "auto"
    """Modules trained in full beside the adapter; "auto" is the classification head."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    options: dict[str, Any] = {}
    """Options of the method."""
    start: str | None = None
    """Folder of an adapter to start from instead of a fresh one."""


class TrainingSection(Section):
    """One client's local training."""

    local_steps: Annotated[int, Field(ge=0)] = 20
    """Optimiser steps per client and round."""
    batch_size: Positive = 8
    """Examples per micro-batch."""
    length_bucketed: bool = False
    """Put texts of like length into a batch, which saves padding; every epoch still has every
    text once. A client's last few texts fill the batch that two epochs share."""
    accumulation: Positive = 1
    """Micro-batches per optimiser step; the loss is weighted by tokens over all of them."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser of the adapter and the heads."""
    learning_rate: Annotated[float, Field(gt=0.0, le=3.4e38)] = 2e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay (L2 for sgd)."""
    momentum: Fraction = 0.0
    """Momentum of sgd."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the whole run, after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up at the start of the run."""
    max_grad_norm: NonNegative = 1.0
    """Clip the gradient of a step to this L2 norm; 0 does not clip."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16 runs the forward pass under autocast."""
    compile: bool = False
    """Run the model's layers by torch.compile, which takes minutes on first use; equal up to
    rounding. Not with record-level privacy."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    optimizer_state: Literal["reset", "keep"] = "reset"
    """Reset the optimiser every round, or keep each client's moments at the client."""
    num_workers: Annotated[int, Field(ge=0)] = 0
    """Loader processes; the order of data does not depend on it."""


class FederationSection(Section):
    """Who takes part and how updates are merged."""

    strategy: str = "fedit"
    """fedit, ffa-lora, rolora, fedex-lora, fedsvd, lora-fair; fed-sb (for method lora-xs);
    fedsa-lora (every client keeps a part of its own); flora, flexlora, hetlora, lora-lego,
    lora-a2 (clients of unequal rank); `file.py:Class`, `package.module:Class`, or a stock
    strategy of Flower such as `flwr:FedAdam`."""
    strategy_options: dict[str, Any] = {}
    """Options of the strategy."""
    wrappers: list[dict[str, Any]] = []
    """What stands around the strategy, e.g. [{name = "multi-krum", hostile = 2}]. The first
    sees the updates first. Known: coordinate-median, fedadagrad, fedadam, fedmomentum, fedprox,
    fedyogi, geometric-median, krum, lodd, multi-krum, norm-cap, scaffold, trimmed-mean."""
    rounds: Positive = 5
    """Rounds of the run."""
    clients_per_round: Positive | None = None
    """Clients chosen per round; by default all."""
    mode: Literal["sync", "async"] = "sync"
    """sync waits for the clients of a round; async merges whenever `buffer` updates have come
    (FedBuff), each weighted by its staleness. Then `clients_per_round` clients are at work at
    the same time, all updates count alike, and `quorum` does not apply."""
    buffer: Positive = 4
    """async: updates per merge, each of which is a round."""
    max_staleness: Annotated[int, Field(ge=0)] = 10
    """async: an update of an adapter older than so many versions is rejected."""
    server_rate: Annotated[float, Field(gt=0.0)] = 1.0
    """async: factor of the merged change."""
    quorum: Positive | None = None
    """Fewest updates a round needs; by default two thirds of those chosen, rounded up."""
    deadline_s: Annotated[float, Field(gt=0.0)] = 600.0
    """Seconds after which a round closes (virtual seconds in a simulation)."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a round below quorum is tried again before the run fails."""
    weighting: Literal["examples", "uniform"] = "examples"
    """Weight of an update in the average."""
    max_update_norm: Annotated[float, Field(gt=0.0)] = 1e4
    """An update with a larger L2 norm is rejected."""
    max_examples: Annotated[float, Field(gt=0.0)] = 1e7
    """An update that claims more examples is rejected."""
    secure_aggregation: bool = False
    """The server learns the weighted sum of updates and no single one (pairwise masks, Bonawitz
    et al. 2017), for strategies that need no more, among 3 to 64 clients of a round. `quorum`
    is its threshold, but at least half the clients and one. Nobody can check single updates
    then. docs/threat-model.md says against whom it protects."""
    secure_bits: Literal[32, 64] = 64
    """Size of masked integers. 64 rounds finer than float32 up to any `max_update_norm`. 32
    halves the upload; an entry is rounded to clients * max_update_norm / 2^31, so set
    `max_update_norm` near real norms, and `weighting` to "uniform"."""


class CompressionSection(Section):
    """How many bits travel. What is left out of an update is made up for in later ones."""

    up: Literal["none", "bf16", "int8", "int4"] = "none"
    """Number format of updates: float32 ("none"), bfloat16, or integers with one scale for each
    64 entries. Of 32 bits per entry they leave 16, 8.25 and 4.25."""
    top_k: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Part of the entries of each tensor of an update that is sent, the largest ones, with
    their positions (1 to 4 bytes each, or a bit mask of the tensor)."""
    error_feedback: bool = True
    """Clients keep what was left out of an update and add it to the next. Strategies that make
    the factors anew between rounds (fedsvd, flexlora, flora, lora-lego) do without it."""
    down: Literal["none", "bf16", "int8"] = "none"
    """Number format of the factors and heads that clients start from. The server keeps its own
    in float32 and adds the updates to these. Folds and bases are never rounded."""


class Hostile(Section):
    """Some clients that misbehave."""

    kind: Literal[
        "nan", "huge-norm", "wrong-shape", "replay", "sign-flip", "scale", "label-flip", "shift"
    ]
    """nan, huge-norm, wrong-shape and replay leave the protocol's bounds and must be
    rejected; sign-flip, scale, label-flip and (colluding) shift stay inside them."""
    clients: list[str] = []
    """Names of the clients; or use `fraction`."""
    fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Part of all clients, chosen by seed."""
    strength: Annotated[float, Field(gt=0.0)] = 1.0
    """Factor of sign-flip, scale and shift. A shift is `strength` times the norm of the
    client's own honest update, in one direction that all of them share."""


class ScenarioSection(Section):
    """What a simulation adds to an ideal network. All of it is seeded."""

    dropout: Fraction = 0.0
    """Probability that a chosen client does not answer in a round."""
    step_s: NonNegative = 1.0
    """Virtual seconds of one local step on an ordinary client."""
    stragglers: Fraction = 0.0
    """Part of the clients that are slow."""
    slowdown: Annotated[float, Field(ge=1.0)] = 10.0
    """How many times slower they are."""
    ranks: list[Positive] = []
    """Unequal hardware: clients, in order of name, take these ranks in turn."""
    hostile: list[Hostile] = []
    """Groups of clients that misbehave."""


class EvaluationSection(Section):
    """What is measured besides the training loss."""

    every: Positive = 1
    """Rounds between evaluations; the last round is always evaluated."""
    batch_size: Positive = 16
    """Examples per forward pass."""
    baselines: list[Literal["local", "centralised"]] = []
    """What the final adapter is set against, at equal local work: each client alone, and all
    data in one place."""
    exact_match: bool = False
    """Also generate completions and compare them exactly (completion data only)."""
    max_new_tokens: Positive = 32
    """Longest generated completion in tokens."""


class RunSection(Section):
    """The run itself."""

    name: Annotated[str, AfterValidator(_folder_name)] = "fedlora"
    """Name of the run; part of the default folder name."""
    seed: Annotated[int, Field(ge=0, lt=2**53)] = 0
    """Derives every random stream by name."""
    engine: Literal["local", "ray", "flower"] = "local"
    """local: all clients in this process, one after the other. ray: in a pool of Ray workers,
    on this machine or, with RAY_ADDRESS set, on a cluster; the same bits, sooner. flower: real
    clients; fedlora run sets it."""
    cohort: Literal["off", "auto"] = "off"
    """auto: with engine = "local", small clients are trained together, and their adapters scored
    together, several in each pass of the model, where that is faster; the result is that of
    "off" up to rounding, not bit for bit, and the run's record says what was done. Under
    record-level privacy that holds with noise = "test"; other noise is new every time. Other
    engines take no notice."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of torch. Sums depend on it, so it belongs to the job."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    keep_rounds: Annotated[int, Field(ge=2)] = 2
    """Committed rounds kept on disk, besides every `keep_every`-th."""
    keep_every: Positive = 10
    """Every so many rounds one is kept for good."""


class Job(Section):
    """The whole job file."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    adapter: AdapterSection = AdapterSection()
    training: TrainingSection = TrainingSection()
    federation: FederationSection = FederationSection()
    compression: CompressionSection = CompressionSection()
    scenario: ScenarioSection = ScenarioSection()
    evaluation: EvaluationSection = EvaluationSection()
    privacy: PrivacySection | None = None
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _fits_together(self) -> "Job":
        partition, federation = self.partition, self.federation
        problems = []
        if not partition.clients and partition.kind not in ("natural", "folders"):
            problems.append(
                f'partition.clients = 0; partition.kind = "{partition.kind}" needs a number'
            )
        chosen = federation.clients_per_round
        if chosen and partition.clients and chosen > partition.clients:
            problems.append(
                f"federation.clients_per_round = {chosen} is more than partition.clients = "
                f"{partition.clients}; choose at most that"
            )
        most = chosen or partition.clients
        if federation.quorum and most and federation.quorum > most:
            problems.append(
                f"federation.quorum = {federation.quorum} is more than the {most} clients of a "
                "round; choose at most that"
            )
        if federation.mode == "async":
            if federation.quorum:
                problems.append('federation.quorum has no meaning with mode = "async"; remove it')
            if most and federation.buffer > most:
                problems.append(
                    f"federation.buffer = {federation.buffer} is more than the {most} clients at "
                    "work at the same time; choose at most that"
                )
        if federation.secure_aggregation:
            problems += secure_misfits(self)
        if any(hostile.kind == "label-flip" for hostile in self.scenario.hostile) and (
            self.model.task == "causal-lm"
        ):
            problems.append(
                'scenario.hostile has kind "label-flip", which needs labels; '
                'model.task = "causal-lm" has none'
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def digest(self) -> str:
        """SHA-256 of the resolved job; two runs with the same digest do the same."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
