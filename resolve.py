"""From what a user asks for to a run: find the model and the rows, and say all that the numbers depend on.

Used by train.py and grid.py.
"""

from dataclasses import replace

import data_prep
import models
import places
from config import FIELDS, NEUTRAL_VALUES, RESULTS_VERSION, Run, RunConfig
from protocol import AFFECTS


def resolve_run(config: RunConfig, prepare: bool = True) -> Run | None:
    """Find the model and the rows, and say all that the numbers depend on.

    A data set that is missing is prepared first, and that is said; with `prepare` false the answer is then None. Raises
    InputError. Writes nothing else. Costs a millisecond for a model and rows that were found before.
    """
    folder, revision = models.find_model(config.model, config.revision)
    layers = models.load_config(folder).num_hidden_layers
    place = places.select_layers(config.corrupt, config.frac, layers, config.layers)
    data = (data_prep.ensure_prepared if prepare else data_prep.up_to_date)(config.dataset, config.data_dir)
    if data is None:
        return None
    settings = {
        "results_version": RESULTS_VERSION,
        "model": models.name_in_results(config.model),
        "model_fingerprint": models.model_fingerprint(folder),
        "side": place.side,
        "frac": str(place.frac),
        "percent": float(100 * place.frac),
        "dataset": data["dataset"],
        "data_fingerprint": data["fingerprint"],
    }
    chosen = {name: getattr(config, name) for name in NEUTRAL_VALUES if name in FIELDS}
    settings |= NEUTRAL_VALUES | chosen | {k: v for k, v in config.trainer.items() if k in AFFECTS}
    return Run(replace(config, dataset=data["dataset"]), config.command, folder, revision, data, settings)
