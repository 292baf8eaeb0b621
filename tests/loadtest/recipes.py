"""A small recipe, and what its stages leave behind when they are done."""

from gradmap.common.files import sha256_json, write_json, write_text
from gradmap.common.fingerprints import fingerprint
from gradmap.common.stages import STAGES_DIRECTORY, stage_key
from loadtest.pipeline.recipe import load_recipe
from loadtest.pipeline.stages import plan_stages

MINIMAL = """
model: {model}
prune: {{remove: 2, calibration: "file:{text}"}}
eval: {{perplexity: {{a: "file:{text}"}}}}
"""
NAMES = ["prune", "eval", "export", "baseline", "loadtest"]
# One file of each stage's directories.
FILES = {
    "prune": "plan.json",
    "export": "gradmap.json",
    "baseline": "gradmap.json",
    "loadtest": "report.json",
}


def finish(recipe_file, out, *names, keep=None):
    """Leaves behind what these stages would have; `keep` is there already."""
    for stage in plan_stages(load_recipe(recipe_file), out):
        if stage.name in names:
            for path in set(stage.outputs) - {keep}:
                write_text(path if path.suffix else path / FILES[stage.name], "{}")
            outputs = {
                name: stamp.model_dump() for name, stamp in fingerprint(stage.outputs, out).items()
            }
            facts = sha256_json(stage.facts())
            record = {
                "key": stage_key(stage),
                "seconds": 1,
                "peak_bytes": 1,
                "outputs": outputs,
                "facts": facts,
            }
            write_json(out / STAGES_DIRECTORY / f"{stage.name}.json", record)
    write_text(out / "recipe.yaml", "")
