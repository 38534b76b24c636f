"""Small results of eval, bench and check, as their verbs return them."""

from headfold.evaluate.classification import Classification
from headfold.evaluate.data import DataEvaluation
from headfold.evaluate.harness import TaskEvaluation, TaskRow
from headfold.evaluate.paired import PairedComparison, PairedRow
from headfold.evaluate.perplexity import Evaluation
from headfold.timing.cases import BenchResult, BenchRow

EVALUATION = Evaluation(
    num_tokens=63, nll=2.5, nll_by_position=(3.0, 2.0), seconds=1.0, reference_nll=2.25, reference_nll_by_position=(2.75, 1.75), kl=0.125,
    top1_agreement=0.75, model="tiny-half", reference="tiny", text="text.txt", context=33, num_windows=2, dtype="float32",
    kv_bytes_per_token=512, reference_kv_bytes_per_token=1024,
)  # fmt: skip
COMPARED = PairedComparison(
    "text.txt", 100, 0,
    [PairedRow("a", "nll", 2.0, None, None, None, None, None, True, "windows", 8),
     PairedRow("b", "nll", 2.5, 0.5, 0.25, 0.75, 0.01, "worse", True, "windows", 8)],
)  # fmt: skip
PAIRED = COMPARED.to_json()
TASKS = TaskEvaluation("a", None, 10, 100, 0, 0.95, [TaskRow("t", "acc", 0, 10, 0.5, 0.25, 0.75, None, False)])
BENCH = BenchResult(
    [BenchRow("a", "sdpa", (4,), 64, 1, 0.1, 0.01, (0.009, 0.011), 0.5, 100.0, 4096, 8192, None, 1e9, {"cache": 0.001})],
    "float32", "cpu", 1, ["avx2"], 2e10, 8, 3, False, False, [], ["a note"],
)  # fmt: skip
CLASSES = DataEvaluation(
    "images",
    "a",
    "b",
    "folder",
    "float32",
    Classification(
        num_items=10,
        accuracy=0.5,
        cross_entropy=1.25,
        seconds=2.0,
        reference_accuracy=0.75,
        reference_cross_entropy=1.0,
        kl=0.125,
        agreement=0.5,
    ),
)
