"""Times ONNX files in other runtimes; run by deploy.py, if need be in a Python of their own.

    python deploy_runtimes.py RUNTIME THREADS SECONDS FILE...

Prints one JSON object: file to median seconds. RUNTIME is onnxruntime, openvino or deepsparse.
Needs nothing but NumPy and the runtime: DeepSparse wants a Python of at most 3.11 and numpy < 2.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np


def onnxruntime(path: str, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs = session.get_inputs()[0]
    x = sample(inputs.shape)
    return lambda: session.run(None, {inputs.name: x})


def openvino(path: str, threads: int) -> Callable[[], object]:
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(path, "CPU", settings)
    request = compiled.create_infer_request()
    x = sample([int(d) for d in compiled.input(0).shape])
    return lambda: request.infer([x])


def deepsparse(path: str, threads: int) -> Callable[[], object]:
    from deepsparse import compile_model
    from onnx import load

    dims = load(path).graph.input[0].type.tensor_type.shape.dim
    x = sample([d.dim_value for d in dims])
    engine = compile_model(path, batch_size=x.shape[0], num_cores=threads)
    return lambda: engine.run([x])


def sample(shape: list[int]) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def median(run: Callable[[], object], seconds: float) -> float:
    for _ in range(3):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 7 or time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    runtime, threads, seconds, *files = sys.argv[1:]
    open_file = {"onnxruntime": onnxruntime, "openvino": openvino, "deepsparse": deepsparse}
    results = {
        path: median(open_file[runtime](path, int(threads)), float(seconds)) for path in files
    }
    print("\n" + json.dumps(results))


if __name__ == "__main__":
    main()
