"""The ServerApp: the round loop of one run, with clients that Flower reaches.

Started by `fedlora server` it works on a run of that server's folder, and bytes travel by the
exchange. Started by plain Flower (`flwr run`) there is no such folder: then the job comes from
the app's configuration, and bytes ride in Flower's messages.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedlora.server.home import HOME_VARIABLE, Home

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Works on the run that the app's configuration names."""
    config: Mapping[str, object] = context.run_config
    home, run = os.environ.get(HOME_VARIABLE), str(config.get("run", ""))
    if home and run:
        place = Home(Path(home)).place(run)
        # before the slow imports, so that the server sees at once that somebody is at work
        with place.working():
            if place.outcome() is not None:
                # stopped before this ServerApp was up
                return
            from fedlora.server.hosted import work_on

            work_on(Home(Path(home)), place, grid)
    else:
        from fedlora.server.plain import run_plainly

        run_plainly(str(config.get("job", "")), str(config.get("out", "")), grid)
