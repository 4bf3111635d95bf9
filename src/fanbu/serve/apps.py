"""What Flower runs: the rounds at the centre, and an owner's answers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fanbu.files import write_text
from fanbu.transport.flower import FlowerLine, from_record, to_record

RESULT = "flower-ended.json"


def server() -> Any:
    """The ServerApp: rounds to their verdicts, of the recipe that the run's config names."""
    import json

    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        from fanbu.errors import FanbuError
        from fanbu.generations import run
        from fanbu.progress import bar
        from fanbu.recipe import load_recipe

        recipe = load_recipe(str(context.run_config["recipe"]), json.loads(str(context.run_config["changes"])))
        ended = Path(recipe.workspace) / RESULT
        try:
            with bar(Path(recipe.workspace)) as show:
                record = run(recipe, show, show.log, FlowerLine(grid))
            write_text(ended, json.dumps({"key": record["key"]}))
        except FanbuError as error:
            write_text(ended, json.dumps({"error": {**error.as_dict(), "exit": error.exit_code}}))

    return app


def client() -> Any:
    """The ClientApp: what an owner says, from the file and in the workspace that its node's config names."""
    from flwr.app import Message
    from flwr.clientapp import ClientApp

    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a centre names no model that an owner would fetch
    app = ClientApp()

    @app.query()
    def query(message: Any, context: Any) -> Any:
        from fanbu.progress import log
        from fanbu.serve.worker import asked

        part, workspace = (Path(str(context.node_config[key])) for key in ("part", "workspace"))
        request = from_record(message.content)
        answers = asked(request, workspace)
        if answers is None:
            from fanbu.owner import answer

            log("the owner's process is not there: this message is answered by one of its own")
            answers = answer(request, part, workspace, log=log)
        if request[0].get("about") == "greeting":
            said = {"domains": {name: body for name, (body, _) in answers.items()}}
            return Message(to_record(said, {}), reply_to=message)
        (answered,) = answers.values()
        return Message(to_record(*answered), reply_to=message)

    return app
