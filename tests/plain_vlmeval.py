"""VLMEvalKit's own way from a file of answers to a score, Excel tables and all: what our worker is held against.

Run with VLMEvalKit's Python: ``plain_vlmeval.py DATA ANSWERS OUT``; ANSWERS holds answers by index by benchmark.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

data, answers, out = map(Path, sys.argv[1:])
os.environ["LMUData"] = str(data)  # noqa: SIM112
worker = Path(__file__).parent.parent / "src" / "unidpo" / "evaluate" / "vlmeval_worker.py"
spec = importlib.util.spec_from_file_location("worker", worker)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.make_torchvision_importable()

import vlmeval.dataset  # noqa: E402
from vlmeval.dataset.image_base import ImageBaseDataset  # noqa: E402

# A checksum that differs would have the published file downloaded over ours.
ImageBaseDataset.prepare_tsv = lambda self, url, file_md5=None: vlmeval.smp.load(str(data / f"{self.dataset_name}.tsv"))
classes = {name: getattr(vlmeval.dataset, cls) for name, cls in module.CLASSES.items()}
published = {name: [cls.DATASET_URL[name], cls.DATASET_MD5[name]] for name, cls in classes.items()}
(out / "published.json").write_text(json.dumps(published))
for name, given in json.loads(answers.read_text()).items():
    dataset = classes[name](name)
    frame = dataset.data.drop(columns="image")
    frame["prediction"] = [given[str(index)] for index in frame["index"]]
    file = out / f"x_{name}.xlsx"
    frame.to_excel(file, index=False)
    score = dataset.evaluate(str(file), model="exact_matching", nproc=1)
    table = [list(score), list(score.values())] if isinstance(score, dict) else [list(score), *score.values.tolist()]
    (out / f"{name}.json").write_text(json.dumps(table, default=float))
