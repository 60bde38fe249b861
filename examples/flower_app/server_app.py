"""Server: Flower's own loop with a strategy of fedlora in it."""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from model import ALPHA, RANK, make_data, make_model
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch.nn.functional import cross_entropy

from fedlora.strategies import as_flower

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Runs the rounds and prints the loss on rows that no client has."""
    model = make_model()
    x, y = make_data(seed=10_000, rows=512)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        with torch.no_grad():
            loss = cross_entropy(model(x), y).item()
        print(f"round {server_round}: loss {loss:.4f}", flush=True)
        return MetricRecord({"loss": loss})

    strategy = as_flower(
        str(context.run_config["strategy"]), rank=RANK, alpha=ALPHA, fraction_evaluate=0.0
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(context.run_config["rounds"]),
        evaluate_fn=evaluate,
    )
