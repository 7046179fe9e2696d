"""Tables of what code of yours can stand beside: criteria, allocations and searches, by name. No torch here.

An entry is a place, not a class, so that settings know all names without importing what has them. One for everybody is
an entry here and the class that it names.
"""

from ppcl.common.plugins import Table

CRITERIA = Table(
    "criterion",
    "fit.criterion",
    {"score": ("transformer", "adapter", "sites", "batches", "seed")},
    {
        "activation": "ppcl.pruning.criteria.activation:Activation",
        "bip": "ppcl.pruning.criteria.bip:Bip",
        "gblm": "ppcl.pruning.criteria.gblm:Gblm",
        "magnitude": "ppcl.pruning.criteria.magnitude:Magnitude",
        "nirvana": "ppcl.pruning.criteria.nirvana:Nirvana",
        "random": "ppcl.pruning.criteria.random:Random",
        "taylor": "ppcl.pruning.criteria.taylor:Taylor",
        "wanda": "ppcl.pruning.criteria.wanda:Wanda",
    },
)
WEIGHT_CRITERIA = Table(
    "criterion",
    "sparsity.criterion",
    {"score": ("seen",)},
    {
        "gblm": "ppcl.pruning.criteria.gblm:GblmWeights",
        "magnitude": "ppcl.pruning.criteria.magnitude:MagnitudeWeights",
        "nirvana": "ppcl.pruning.criteria.nirvana:NirvanaWeights",
        "random": "ppcl.pruning.criteria.random:RandomWeights",
        "taylor": "ppcl.pruning.criteria.taylor:TaylorWeights",
        "wanda": "ppcl.pruning.criteria.wanda:WandaWeights",
    },
)
SEARCHES = Table(
    "search",
    "plan.mode",
    {"cost": ("context",), "choose": ("context",)},
    {
        "optimal": "ppcl.pruning.planner:optimal",
        "paper": "ppcl.pruning.planner:paper",
        "uniform": "ppcl.pruning.planner:uniform",
        "influence": "ppcl.pruning.planner:influence",
        "allocation": "ppcl.pruning.planner:allocation",
        "random": "ppcl.pruning.searches.orders:Random",
        "position": "ppcl.pruning.searches.orders:Position",
        "path": "ppcl.pruning.searches.path:Path",
        "learned": "ppcl.pruning.searches.learned:Learned",
        "rarts": "ppcl.pruning.searches.rarts:Rarts",
    },
)
ALLOCATIONS = Table(
    "allocation",
    "plan.allocation",
    {"__call__": ()},
    {"uniform": "ppcl.pruning.allocations:uniform", "nirvana": "ppcl.pruning.allocations:nirvana"},
)
