"""A Flower app in one process: an in-memory Grid, and PEFT clients on generated data."""

import itertools

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from fedlora.seeds import generator

NODES = (7, 23, 1_000_000_007)
PREFIX = "base_model.model."


class MemoryGrid(Grid):
    """Sends every message to `answer`, which gives the replies to it."""

    def __init__(self, answer, nodes=NODES):
        self.answer, self.nodes = answer, nodes
        self.replies, self.sent, self.ids = {}, [], itertools.count()

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        pushed = []
        for message in messages:
            number = f"message-{next(self.ids)}"
            self.sent.append(message)
            self.replies[number] = self.answer(message)
            pushed.append(number)
        return pushed

    def pull_messages(self, message_ids):
        return [reply for number in message_ids for reply in self.replies.pop(number)]

    def send_and_receive(self, messages, *, timeout=None):
        # a real grid gives them in the order of arrival, which is anybody's
        return list(reversed(self.pull_messages(self.push_messages(messages))))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def peft_model(rank=2):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["first", "second"],
            modules_to_save=["head"],
        )
        return get_peft_model(Net(), config)


class Clients:
    """PEFT training of one shared model; what a node trains depends on node and arrays alone."""

    def __init__(self):
        self.model = peft_model()
        self.initial = {k: v.clone() for k, v in get_peft_model_state_dict(self.model).items()}

    def train(self, node, tensors, factors):
        """Arrays after a few steps of SGD on the named factors and the head."""
        set_peft_model_state_dict(self.model, dict(tensors))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = "modules_to_save" in name or any(
                f".{factor}." in name for factor in factors
            )
        draws = generator(0, "data", str(node))
        x, y = torch.randn(16, 5, generator=draws), torch.randn(16, 2, generator=draws)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.mse_loss(self.model(x), y).backward()
            optimizer.step()
        return {k: v.clone() for k, v in get_peft_model_state_dict(self.model).items()}

    def answer(self, message):
        """The replies of an honest node."""
        return [Message(self.content(message), reply_to=message)]

    def content(self, message):
        node, content = message.metadata.dst_node_id, message.content
        tensors = state_dict(content["arrays"])
        if message.metadata.message_type == "evaluate":
            metrics = {"num-examples": 10 + node % 5, "loss": float(node)}
            return RecordDict({"metrics": MetricRecord(metrics)})
        trained = self.train(node, tensors, content["config"]["fedlora-factors"])
        metrics = {"num-examples": 10 + node % 5, "loss": 1.5}
        return RecordDict({"arrays": arrays(trained), "metrics": MetricRecord(metrics)})


def failed(message):
    return [Message(Error(code=1, reason="out of memory"), reply_to=message)]


def arrays(tensors):
    return ArrayRecord({k: Array(np.asarray(v.numpy())) for k, v in tensors.items()})


def state_dict(record):
    return {k: torch.from_numpy(v.numpy()) for k, v in record.items()}
