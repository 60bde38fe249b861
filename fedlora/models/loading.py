"""Loads a base model and its tokenizer or image processor, from a folder, hub or builtin."""

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedlora.config.job import ModelSection
from fedlora.errors import ConfigError, ModelError
from fedlora.hub import hub_or_cache
from fedlora.models.fingerprint import fingerprint
from fedlora.seeds import derive_seed, generator

BUILTIN = {"builtin:tiny-llama": Path(__file__).parent / "tiny_llama"}


@dataclass(frozen=True)
class Processor:
    """What turns rows into model inputs.

    Attributes:
        tokenizer: for text tasks.
        image_processor: for image-classification.
        pad_id: padding token; 0 where the task has none.
    """

    tokenizer: Any | None
    image_processor: Any | None
    pad_id: int


@dataclass(frozen=True)
class BaseModel:
    """A frozen base.

    Attributes:
        model: a transformers model of the task, without any dropout.
        heads: names of the modules that a classification task trains in full.
        fingerprint: SHA-256 over configuration and weights, heads excluded.
    """

    model: nn.Module
    heads: tuple[str, ...]
    fingerprint: str


def load_processor(section: ModelSection) -> Processor:
    """Tokenizer or image processor of the model.

    Raises:
        ModelError: missing, or not of the kind the task needs.
    """
    from transformers import AutoImageProcessor, AutoTokenizer

    source = _source(section)
    if section.task == "image-classification":
        with _model_errors(section):
            processor = AutoImageProcessor.from_pretrained(source, revision=section.revision)
        return Processor(None, processor, 0)
    with _model_errors(section):
        tokenizer = AutoTokenizer.from_pretrained(source, revision=section.revision)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(
                f"model.name = {section.name!r}: its tokenizer has neither a padding nor an "
                "end token; give the model folder a tokenizer that has one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return Processor(tokenizer, None, int(tokenizer.pad_token_id))


def load_base(
    section: ModelSection,
    *,
    labels: Sequence[str],
    pad_id: int,
    seed: int,
    heads: Sequence[str] | None = None,
    device: str = "cpu",
) -> BaseModel:
    """The base model of the job.

    Args:
        heads: modules trained in full; None finds them (see `find_heads`).
        labels: class names of a classification task, in order.
        pad_id: padding token of the tokenizer.
        seed: weights that the checkpoint lacks (a new head) are drawn from it.
        device: where the model goes.

    Raises:
        ConfigError: a head that the model does not have.
        ModelError: missing, not a model, weights that are not safetensors, or a language
            model whose checkpoint lacks weights.
    """
    import transformers

    auto = {
        "causal-lm": transformers.AutoModelForCausalLM,
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "image-classification": transformers.AutoModelForImageClassification,
    }[section.task]
    options: dict[str, Any] = {}
    own_labels: list[str] = []
    if section.task != "causal-lm":
        options["num_labels"] = len(labels)
        options["id2label"] = dict(enumerate(labels))
        options["label2id"] = {label: i for i, label in enumerate(labels)}
        options["ignore_mismatched_sizes"] = True
    with quiet(), _model_errors(section), torch.random.fork_rng(devices=[]):
        if section.task != "causal-lm":
            config = transformers.AutoConfig.from_pretrained(
                _source(section), revision=section.revision
            )
            own_labels = [config.id2label[i] for i in sorted(config.id2label)]
        torch.manual_seed(derive_seed(seed, "model"))
        model, info = auto.from_pretrained(
            _source(section),
            revision=section.revision,
            dtype=getattr(torch, section.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    if section.task == "sequence-classification":
        model.config.pad_token_id = pad_id
    _silence_dropout(model)
    lacking = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    if lacking and section.task == "causal-lm":
        raise ModelError(
            f"model.name = {section.name!r} lacks the weights {', '.join(sorted(lacking)[:3])}; "
            "give a checkpoint of the whole language model"
        )
    found = tuple(heads) if heads is not None else find_heads(model, section.task, lacking)
    modules = dict(model.named_modules())
    for head in found:
        if head not in modules:
            raise ConfigError(
                f"adapter.heads names {head!r}, which the model does not have; its top modules "
                f"are {', '.join(name for name, _ in model.named_children())}"
            )
        # trained in full, so it keeps float32 precision on a bf16 base too
        modules[head].float().register_forward_pre_hook(_widen)
        if "." in head:
            # inside the body, it is followed by layers in the body's own number format
            narrow = getattr(torch, section.dtype)
            modules[head].register_forward_hook(lambda m, x, y, dtype=narrow: y.to(dtype))
    if section.task != "causal-lm" and own_labels != list(labels):
        _redraw(model, seed)
    model.requires_grad_(False)
    model.eval()
    model.to(device)
    return BaseModel(model, found, fingerprint(model, found))


def find_heads(model: nn.Module, task: str, lacking: Collection[str]) -> tuple[str, ...]:
    """The modules a classification task trains in full; none for a language model.

    These are the top modules outside the pretrained body, and every module whose weights the
    checkpoint lacks (a BERT without pooler, say): left as drawn, it would differ between
    people who load the same checkpoint.
    """
    if task == "causal-lm":
        return ()
    body = getattr(model, "base_model_prefix", "")
    heads = {
        name
        for name, module in model.named_children()
        if name != body and any(True for _ in module.parameters())
    }
    heads |= {key.rpartition(".")[0] for key in lacking}
    return tuple(sorted(h for h in heads if not any(h.startswith(f"{other}.") for other in heads)))


def _redraw(model: nn.Module, seed: int) -> None:
    """Draws the classification head anew: the checkpoint's own is for other classes.

    Kept under new names, it would start with classes swapped.
    """
    body = getattr(model, "base_model_prefix", "")
    for child, module in model.named_children():
        if child == body:
            continue
        for name, parameter in module.named_parameters():
            stream = generator(seed, "head", child, name)
            draws = torch.randn(parameter.shape, generator=stream) * 0.02
            with torch.no_grad():
                if parameter.dim() > 1:
                    parameter.copy_(draws)
                elif name.endswith("bias"):
                    parameter.zero_()


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(
        x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    )


def _source(section: ModelSection) -> str:
    name = section.name
    if name.startswith("builtin:"):
        if name not in BUILTIN:
            raise ModelError(f"model.name = {name!r} is not known; known: {', '.join(BUILTIN)}")
        return str(BUILTIN[name])
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"model.name = {name!r} is a folder without config.json, so not a transformers "
                "model; give the folder that save_pretrained wrote"
            )
        return str(path)
    if (
        path.is_absolute()
        or name.startswith((".", "~"))
        or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name)
    ):
        raise ModelError(f"model.name = {name!r}: the folder does not exist")
    return name


@contextmanager
def _model_errors(section: ModelSection) -> Iterator[None]:
    here = section.name in BUILTIN or Path(section.name).expanduser().is_dir()
    try:
        with nullcontext() if here else hub_or_cache():
            yield
    except ModelError:
        raise
    except Exception as e:  # transformers, hub and safetensors raise many kinds
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise ModelError(
            f"model.name = {section.name!r} cannot be loaded for task {section.task!r}: {reason}"
        ) from e


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars and its report of a head it had to make."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _silence_dropout(model: nn.Module) -> None:
    # the base is frozen, and its dropout would draw from the process-wide generator
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            # dropout, drop_path, drop_prob, layerdrop: all draw from that generator
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    config = getattr(model, "config", None)
    for name, value in list(vars(config).items()) if config is not None else ():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
