"""Commands that write and serve the explorer's page: explore and serve."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from tyro.conf import Positional, arg

import unsleep
from unsleep.behaviours import Payload
from unsleep.cli.console import Bars, say
from unsleep.cli.repairs import material_of
from unsleep.cli.shared import (
    Out,
    PayloadOptions,
    Placed,
    Placement,
    Shown,
    belonging,
    load_dictionaries,
    own_prompts,
)
from unsleep.core import BadInput
from unsleep.dictionaries.coders import Coder
from unsleep.explorer.session import Live
from unsleep.explorer.start import check, open_browser
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit
from unsleep.interventions.intervention import Intervention
from unsleep.judge.evaluate import organism_config
from unsleep.models.model import LoadedModel
from unsleep.organisms import Organism
from unsleep.repairs import Material, from_recipe

PANEL = 100
"""Default number of prompts in each panel of an organism."""


def explore(folder: Annotated[Positional[Path], arg(metavar="DIR")], out: Out, json: bool = False) -> int:
    """Write the page on which features, circuits and evaluations are explored; it opens from disk.

    Args:
        folder: Folder with report.json, result.json, circuit.json or statistics of features, in it or below.
        out: Folder for the page; one made before is replaced.
        json: Print the path as JSON.
    """
    with Bars():
        path = unsleep.explore(folder, out)
    say({"explorer": str(path)}, json, f"Page in {path}; open it in a browser")
    return 0


def serve(
    folder: Annotated[Positional[Path], arg(metavar="DIR")],
    model: str | None = None,
    dictionaries: tuple[Path, ...] = (),
    edit: Path | None = None,
    organism: str | None = None,
    suspicious: Path | None = None,
    ordinary: Path | None = None,
    payload: Shown = PayloadOptions(),
    counterparts: Path | None = None,
    part: str | None = None,
    n: int | None = None,
    any_model: bool = False,
    port: int | None = None,
    browser: bool = True,
    placement: Placed = Placement(),
) -> int:
    """Serve an explorer folder on this machine: its page, and with --model chats, proofs and baking.

    Only the browser that opens the printed link can use it. Ctrl-C stops the server.

    Args:
        folder: Folder made by `unsleep explore`.
        model: Live model: hub id, folder, adapter folder, .gguf file or alias. Without it, the page is as it opens
            from disk.
        dictionaries: Folders of dictionaries, one per Site, or the folder that contains them.
        edit: Folder made by `unsleep edit`, that the page begins with; its selection prompts are refused in a proof.
        organism: A packaged organism or a folder made by `unsleep plant`: proofs are on its held-out panels.
        suspicious: File of prompts on which the behaviour shows, one per line; a part is held out for proofs.
        ordinary: File of prompts on which it does not; likewise.
        counterparts: File with each suspicious prompt without its trigger, line by line.
        part: Text of the trigger; the suspicious prompts without it are the counterparts.
        n: Held-out prompts per panel. Default: 100 of an organism, half of each file.
        any_model: Accept dictionaries of another model.
        port: 1024 to 65535. Default: any that is free.
        browser: Open the link in the browser.
    """
    check(folder, port)
    given = own_prompts(
        organism,
        suspicious=suspicious,
        ordinary=ordinary,
        payload=payload.chosen(),
        counterparts=counterparts,
        part=part,
    )
    live = None
    if model is not None:
        material = _material(given, (suspicious, ordinary), payload.chosen(), (counterparts, part), n)
        live = _live(lambda: placement.load(model), (dictionaries, any_model), edit, given, material)
    elif any((dictionaries, edit, given, suspicious, ordinary, payload.chosen(), counterparts, part, n, any_model)):
        raise BadInput("dictionaries, an edit and prompts are for a live model; name it with --model")

    def opened(address: str) -> None:
        sys.stdout.write(f"Open {address}\nThe link works once. Ctrl-C stops the server.\n")
        sys.stdout.flush()
        if browser:
            open_browser(address)

    unsleep.serve(folder, live, port=port, opened=opened)
    return 0


def _live(
    load: Callable[[], LoadedModel],
    dictionaries: tuple[Sequence[Path], bool],
    edit: Path | None,
    organism: Organism | None,
    material: Material | None,
) -> Live:
    """Read the small files, then load the model; `dictionaries` are folders, and True to accept another model's."""
    changes, chosen_on = load_edit(edit) if edit is not None else ([], frozenset[str]())
    edits = [_feature_edit(each, edit) for each in changes]
    loose = _with_own(load_dictionaries(dictionaries[0]), edits)
    model = load()
    if organism is not None:
        organism.check_template(model)
    return Live(
        model,
        belonging(loose, model, dictionaries[1]),
        material,
        organism_config(organism.recipe).reply_tokens if organism is not None else None,
        edits,
        edit.name if edit is not None else "",
        chosen_on,
    )


def _material(
    organism: Organism | None,
    files: tuple[Path | None, Path | None],
    payload: Payload | None,
    plain: tuple[Path | None, str | None],
    n: int | None,
) -> Material | None:
    """Selection and held-out prompts; `None` where none are given."""
    if n is not None and n < 2:
        raise BadInput(f"--n is {n}; expected at least 2")
    if organism is not None:
        return from_recipe(organism.recipe, judge=n or PANEL)
    if all(given is None for given in (*files, payload, *plain, n)):
        return None
    missing = "a proof needs all of --suspicious, --ordinary and --payload, or --organism"
    return material_of(files, payload, plain, n, missing=missing)


def _feature_edit(each: Intervention, folder: Path | None) -> Edit:
    if not isinstance(each, Edit):
        raise BadInput(f"{folder} has a {type(each).__name__.lower()}; the page shows ablated features only")
    return each


def _with_own(dictionaries: Sequence[Coder], edits: Sequence[Edit]) -> list[Coder]:
    """The dictionaries, and those of an edit at other Sites.

    Raises `BadInput` where an edit was made with another dictionary of a Site, whose features have other numbers.
    """
    found = {d.site: d for d in dictionaries}
    for each in edits:
        own = each.dictionary
        assert isinstance(own, Coder)
        rows = [d.decoder.to(torch.bfloat16) for d in (found.setdefault(each.site, own), own)]
        if rows[0].shape != rows[1].shape or not torch.equal(rows[0], rows[1]):
            raise BadInput(
                f"--edit was made with another dictionary of {each.site} than --dictionaries has, and its features "
                "have other numbers; give the edit's own dictionaries"
            )
    return list(found.values())
