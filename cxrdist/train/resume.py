"""Resume: the latest checkpoint of a run, and the stages that are left after it."""

import sys
from functools import partial

from tqdm import tqdm

from cxrdist.distributed import gather, on_main, say, together
from cxrdist.errors import CxrdistError
from cxrdist.files import cut_log, write_json
from cxrdist.info import read_info
from cxrdist.train.checkpoint import Checkpoint, fitting, load_latest, load_network
from cxrdist.train.publish import publish_stage
from cxrdist.train.training import Training, fixed_recipe


def resume(training: Training) -> tuple[Checkpoint | None, list[str]]:
    """Load the latest checkpoint into the network, if there is one.

    Returns:
        The checkpoint, and the stages from the one that it belongs to on, or from the next one if
        that is finished.
    """
    names = list(training.recipe.stages)
    checkpoint = _read_latest(training)
    steps_done = checkpoint.position.steps_done if checkpoint else 0
    on_main(training.accelerator, lambda: _note_launch(training, steps_done))
    if checkpoint is None:
        return None, names
    position = checkpoint.position
    within = f" and step {position.step} of the next" if position.step else ""
    say(training.accelerator, f"resuming after {position.stage}, epoch {position.epoch}{within}")
    with fitting(position.name):
        left = names[names.index(position.stage) + position.finished :]
        # The next stage starts from these. `StageRun` loads the last ones of an unfinished stage.
        if checkpoint.best:
            load_network(training.model.network, checkpoint.best)
    if position.finished:  # perhaps it was killed before it published that stage
        publish_stage(training, position.stage)
    return checkpoint, left


def _note_launch(training: Training, steps_done: int) -> None:
    """Note in run.json on what hardware the steps from here on are done, if it has changed.

    Steps that an earlier launch did after the checkpoint are lost. A launch that did no others has
    no entry.
    """
    info = read_info(training.run)
    launches = [launch for launch in info.get("launches", []) if launch["from_step"] < steps_done]
    world_size, device = info["world_size"], info["device"]
    if not launches or (launches[-1]["world_size"], launches[-1]["device"]) != (world_size, device):
        launches.append({"world_size": world_size, "device": device, "from_step": steps_done})
    write_json(training.run.info, {**info, "launches": launches})


def _read_latest(training: Training) -> Checkpoint | None:
    """Read the latest whole checkpoint on all ranks, and cut off what was logged after it."""
    accelerator, run = training.accelerator, training.run
    warn = partial(tqdm.write, file=sys.stderr) if accelerator.is_main_process else lambda _: None
    recipe = fixed_recipe(training.recipe)
    checkpoint = together(accelerator, lambda: load_latest(run.checkpoints, recipe, warn))
    names = set(gather(accelerator, [checkpoint.position.name if checkpoint else "none"]))
    if len(names) > 1:
        raise CxrdistError(
            f"{run.checkpoints}: the ranks see different checkpoints ({', '.join(sorted(names))}); "
            "give a run directory that all nodes share"
        )
    log_bytes = checkpoint.position.log_bytes if checkpoint else 0
    on_main(accelerator, lambda: cut_log(run.log, log_bytes))
    return checkpoint
