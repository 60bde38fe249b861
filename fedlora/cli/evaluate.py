"""`fedlora evaluate`"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from fedlora.cli.simulate import KNOWN
from fedlora.config.job import Job
from fedlora.config.load import load_job
from fedlora.data.federated import load_test
from fedlora.errors import ConfigError
from fedlora.evaluate import evaluate, exact_match
from fedlora.models.assemble import assemble, run_of
from fedlora.report.text_table import result_table


def run_evaluate(
    path: Path,
    model: str | None,
    data: Path | None,
    overrides: Sequence[str],
    *,
    client: str | None = None,
    as_json: bool,
) -> None:
    """Measures base and adapter on a file or on the run's own test data."""
    # only a run's own job tells its test data; one that merely lies beside an adapter does not
    run = run_of(path)
    job_file = run / "job.toml" if (run / "HEAD").is_file() else None
    if job_file is None and data is None:
        raise ConfigError(f"{path} is in no run folder, so it has no test data; give --data FILE")
    split = [o for o in overrides if o.startswith(("data.", "partition.", "run.seed"))]
    if split and data is None:
        raise ConfigError(
            f"override {split[0]!r} would divide the data anew, so that training rows could be "
            "tested; give --data FILE"
        )
    job = load_job(job_file, overrides, KNOWN) if job_file else Job()
    torch.set_num_threads(job.run.threads)
    assembled = assemble(path, model, job.run.device, client)
    if job_file is None:
        task = f'model.task="{assembled.section.task}"'
        job = load_job(None, [*overrides, task], KNOWN)
    if data is not None:
        section = job.data.model_copy(update={"test": str(data)})
        job = job.model_copy(update={"data": section})
    processor = assembled.processor
    examples = load_test(
        job.data,
        job.partition,
        assembled.section.task,
        labels=assembled.adapter.labels,
        tokenizer=processor.tokenizer,
        image_processor=processor.image_processor,
        seed=job.run.seed,
    )

    def scores() -> dict[str, float]:
        found: dict[str, float] = evaluate(
            assembled.base.model,
            examples,
            task=assembled.section.task,
            pad_id=processor.pad_id,
            batch_size=job.evaluation.batch_size,
        )
        if job.evaluation.exact_match:
            matched = exact_match(
                assembled.base.model,
                processor.tokenizer,
                examples,
                pad_id=processor.pad_id,
                max_new_tokens=job.evaluation.max_new_tokens,
            )
            if matched is not None:
                found["exact_match"] = matched
        return found

    base: dict[str, float] = {}
    if not assembled.adapter.spec.heads:
        # with a trained head on it, the bare body would be neither base nor adapter
        with assembled.adapted.base_only():
            base = scores()
    result: dict[str, Any] = {"num_examples": len(examples), "base": base, "adapter": scores()}
    if as_json:
        typer.echo(json.dumps(result))
        return
    from rich.console import Console

    summary = {"base": base, "global": result["adapter"]}
    Console().print(result_table(summary, assembled.section.task))
