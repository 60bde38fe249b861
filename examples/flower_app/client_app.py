"""Clients: plain PEFT training; nothing in it knows of fedlora but the list of factors."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from model import make_data, make_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """A few steps on the node's own rows."""
    model = make_model()
    set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
    factors = message.content["config"]["fedlora-factors"]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "modules_to_save" in name or any(f in name for f in factors)
    x, y = make_data(int(context.node_config["partition-id"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.005)
    for _ in range(20):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": len(x), "train_loss": loss.item()}),
        }
    )
    return Message(content, reply_to=message)
