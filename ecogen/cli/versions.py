"""The verbs for what a run's lessons led to: list the versions, go back to one."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from ecogen.cli.application import app
from ecogen.cli.runs import RunFolder

if TYPE_CHECKING:
    from ecogen.engines.rollback import Listed


@app.command()
def versions(
    run_folder: RunFolder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the versions as one JSON array.")] = False,
) -> None:
    """List the versions that the relay's lessons led to.

    Of the cloud, each lesson that it accepted made one; of an edge two, what it had before and after. In the table
    lessons and rounds count from 1, with --json `cycle` and `round_index` from 0.
    """
    from ecogen.engines.rollback import list_versions

    listed = list_versions(run_folder)
    if as_json:
        print(json.dumps([_table(one) for one in listed]))
        return
    if not listed:
        print("no versions yet: nobody has accepted a lesson")
        return
    from ecogen.reports.console import show_table

    Console().print(show_table(_shown(listed)))


@app.command()
def rollback(
    run_folder: RunFolder,
    node: Annotated[str, typer.Option("--node", metavar="NODE_ID", help="The cloud, or an edge such as edge-0.")],
    to: Annotated[int, typer.Option("--to", metavar="N", min=0, help="The version, as `ecogen versions` tells it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print what was done as one JSON object.")] = False,
) -> None:
    """Go back to an earlier version of the cloud or an edge.

    For the saved model, which is judged anew, and for a run that is resumed. A run that is going on is to end first.
    """
    from ecogen.engines.rollback import roll_back

    done = roll_back(run_folder, node, to)
    if as_json:
        aside = {"before": done.before, "set_aside": done.set_aside, "saved": done.is_saved}
        print(json.dumps({"node_id": done.node_id, "version": done.version, **aside}))
        return
    if done.before == done.version and done.set_aside is None:
        print(f"{done.node_id} has version {done.version} already")
        return
    kept = "" if done.set_aside is None else f"; what it had is version {done.set_aside} now"
    used = "the saved model is that one" if done.is_saved else "the run goes on from it when it is resumed"
    print(f"{done.node_id}: from version {done.before} to version {done.version}{kept}; {used}")


def _table(one: Listed) -> dict[str, Any]:
    scores = {
        score.name: {"before": score.before, "after": score.after, "is_new": score.is_new} for score in one.scores
    }
    return {
        "node_id": one.node_id,
        "version": one.version,
        "what": one.what,
        "cycle": one.cycle,
        "round_index": one.round_index,
        "accepted_s": one.time_s,
        "scores": scores,
        "in_use": one.in_use,
        "tuned_on": one.is_tuned_on,
    }


def _shown(listed: list[Listed]) -> Any:
    from ecogen.reports.tables import Column, Table, identifier, word
    from ecogen.reports.wording import DASH, format_number

    def row(one: Listed) -> tuple[str, ...]:
        what = one.what if one.cycle is None else f"{one.what} {one.cycle + 1}"
        accepted = time.strftime("%m-%d %H:%M", time.localtime(one.time_s)) if one.time_s else DASH
        told = (f"{s.name}: {format_number(s.before)} → {format_number(s.after)}" for s in one.scores)
        use = ("yes, tuned since" if one.is_tuned_on else "yes") if one.in_use else ""
        return (one.node_id, str(one.version), what, accepted, "\n".join(told) or DASH, use)

    columns = (
        identifier("node"),
        Column("no."),
        identifier("lesson"),
        word("when"),
        identifier("perplexity"),
        word("in use"),
    )
    return Table("Versions", columns, tuple(map(row, listed)))
