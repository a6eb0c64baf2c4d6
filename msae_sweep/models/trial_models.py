"""Read the models of a sweep's trials from the sweep folder and check that they are undamaged."""

from collections.abc import Sequence

from msae_sweep.errors import DataError
from msae_sweep.sae import model_file
from msae_sweep.sweep_folder.folder import SweepFolder
from msae_sweep.sweep_folder.trial_record import TrialRecord, ranked


def unreadable_models(folder: SweepFolder, records: Sequence[TrialRecord]) -> dict[str, str]:
    """Return what is wrong with models that cannot be read, by trial_id. Only the best trial per block is checked."""
    lost = {}
    for block in {record.block for record in records}:
        best = next((r for r in ranked([r for r in records if r.block == block]) if r.has_model), None)
        if best is None:
            continue
        try:
            load_model(folder, best.trial_id)
        except DataError as error:
            lost[best.trial_id] = str(error)
    return lost


def load_model(folder: SweepFolder, trial_id: str) -> model_file.ModelFile:
    """Return the best model of a trial.

    Raises:
        DataError: the model file is missing or damaged.
    """
    file = folder.model_file(trial_id)
    content = folder.read(file)
    if content is None:
        raise DataError(f"{file} is missing")
    try:
        model_file.verify_checksums(content)
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error})") from None
    return model_file.load(file, content)
