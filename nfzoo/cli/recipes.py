"""The command on recipes."""

from typing import Annotated

import typer
from rich.table import Column, Table

from nfzoo.cli.common import Settings, app, console, recipe_of


@app.command(rich_help_panel="Training")
def recipes(
    name: Annotated[str | None, typer.Argument(help="print this one in full, as JSON")] = None,
    set_: Settings = None,
) -> None:
    """List the recipes, or print one with its changes."""
    from nfzoo import recipes as module

    if name:
        print(recipe_of(name, set_).model_dump_json(indent=1))
        return
    if set_:
        raise ValueError("Expected the name of the recipe that --set changes. Received: none")
    rows = {row: module.describe(recipe) for row, recipe in module.RECIPES.items()}
    view = Table(Column("recipe", no_wrap=True), *next(iter(rows.values())), caption="sources: docs/recipes.md")
    for row, cells in rows.items():
        view.add_row(row, *cells.values())
    console.print(view)
