"""A job of benchmarks/cohort.py in Flower's simulation: a ClientApp that trains by our function.

A module of its own, because Flower's worker processes import what the ClientApp is made of.
"""

import itertools
import os
import time
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.app import RecordDict as Records
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from benchmarks.cohort_job import Case, job_for
from fedlora.config.job import Job
from fedlora.models.loaded import Loaded, load
from fedlora.training.trainer import LocalWork, train


class Whole(FedAvg):
    """FedAvg that takes no round in which a client failed."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        failed = [reply for reply in replies if reply.has_error()]
        if failed or len(replies) != self.min_train_nodes:
            raise AssertionError(
                f"round {server_round}: {len(replies) - len(failed)} of {self.min_train_nodes} "
                f"clients trained; {failed[0].error if failed else 'the others sent nothing'}"
            )
        return super().aggregate_train(server_round, replies)


@lru_cache(maxsize=1)
def _held(folder: Path, text: str) -> tuple[Job, Loaded]:
    """Model and data of a worker process of Flower's."""
    job = Job.model_validate_json(text)
    return job, load(job)


def rounds(case: Case, folder: Path) -> list[float]:
    """Seconds of each round but the first.

    Raises:
        AssertionError: not every client trained in every round.
    """
    client_app, server_app = ClientApp(), ServerApp()
    stamps: list[float] = []
    job = job_for(case, folder)
    text, cores = job.model_dump_json(), os.cpu_count() or 1
    initial = {name: value.numpy() for name, value in load(job).initial.tensors.items()}
    building = case.engine == "flower, building"

    @client_app.train()
    def fit(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        if building:
            _held.cache_clear()
        job, loaded = _held(folder, text)
        name = sorted(loaded.data.clients)[int(context.node_config["partition-id"])]
        arrays = message.content["arrays"]
        loaded.adapted.load({key: torch.tensor(a.numpy()) for key, a in arrays.items()})
        examples = loaded.data.clients[name].train
        steps = job.training.local_steps
        result = train(
            loaded.adapted,
            examples,
            LocalWork(("A", "B"), steps, 0, steps, seed=0, client=name, round=1),
            job.training,
            task=job.model.task,
            pad_id=loaded.processor.pad_id,
        )
        content = Records(
            {
                "arrays": ArrayRecord({k: Array(v.numpy()) for k, v in result.trained.items()}),
                "metrics": MetricRecord({"num-examples": len(examples)}),
            }
        )
        return Message(content=content, reply_to=message)

    def stamp(number: int, arrays: ArrayRecord) -> None:
        stamps.append(time.perf_counter())

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        Whole(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=case.clients,
            min_available_nodes=case.clients,
        ).start(
            grid=grid,
            initial_arrays=ArrayRecord({name: Array(a) for name, a in initial.items()}),
            num_rounds=case.rounds,
            train_config=ConfigRecord({}),
            evaluate_fn=stamp,
        )

    run_simulation(
        server_app,
        client_app,
        num_supernodes=case.clients,
        backend_name="ray",
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": cores, "include_dashboard": False},
        },
    )
    if len(stamps) != case.rounds + 1:
        raise AssertionError(f"Flower finished {len(stamps) - 1} of {case.rounds} rounds")
    return [b - a for a, b in itertools.pairwise(stamps)][1:]
