"""What the engine finds on this machine: the report of `univigu env`.

Nothing in it names a user: home and installation folders are replaced in every text.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib import import_module, metadata
from pathlib import Path

from engine import __version__
from engine.planning.machine import total_memory, usable_cores

GIB = 2**30
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
EXTRAS = {  # module: extra that installs it
    "triton": "triton",
    "flash_attn": "flash-attn",
    "xformers": "xformers",
    "tokenizers": "models",
    "diffusers": "bench",
    "transformers": "bench",
    "ftfy": "models",
    "av": "video",
    "PIL": "video",
    "matplotlib": "train",
    "tensorboard": "train",
    "wandb": "wandb",
    "pytest_benchmark": "bench",
}
LIBRARIES = ("flash_attn", "xformers")  # of EXTRAS, those that univigu_kernels imports


def collect() -> dict:
    """The report as plain JSON values."""
    return {
        "engine": __version__,
        "system": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu(),
        "torch": torch_build(),
        "driver": driver(),
        "packages": packages(),
        "compiled kernels": compiled_kernels(),
        "kernels": backends(),
    }


def cpu() -> dict:
    """Name, instruction sets that the kernels ask for, cores and GiB of memory."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.is_file() else []
    facts = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = facts.get("flags", "").split()
    memory = total_memory()
    return {
        "name": facts.get("model name") or platform.processor() or platform.machine(),
        "instruction sets": [name for name in INSTRUCTIONS if name in flags],
        "cores": os.cpu_count(),
        "cores usable": usable_cores(),
        "memory GiB": None if memory is None else round(memory / GIB, 1),
    }


def torch_build() -> dict:
    """Version, CUDA of the build, threads, and the devices with compute capability and memory."""
    import torch

    found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    devices = [torch.cuda.get_device_properties(i) for i in found]
    return {
        "version": torch.__version__,
        "CUDA build": torch.version.cuda or "none",
        "threads": torch.get_num_threads(),
        "devices": [
            {
                "name": device.name,
                "compute capability": f"{device.major}.{device.minor}",
                "memory GiB": round(device.total_memory / GIB, 1),
            }
            for device in devices
        ],
    }


def driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no nvidia-smi on the PATH)"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({anonymous(error)})"
    if result.returncode:
        return f"unknown ({anonymous(result.stdout + result.stderr)})"
    return result.stdout.splitlines()[0]


def packages() -> dict[str, str]:
    """What `package` says of every extra; the kernels say which of flash-attn's packages fit."""
    found = {name: package(name, extra) for name, extra in EXTRAS.items() if name not in LIBRARIES}
    try:
        from univigu_kernels._libraries import describe
    except RuntimeError as error:  # built for another torch: "compiled kernels" says so too
        attention = dict.fromkeys(LIBRARIES, f"unknown: {anonymous(error)}")
    else:
        attention = {name: anonymous(describe(name)) for name in LIBRARIES}
    return {name: (found | attention)[name] for name in EXTRAS}


def package(module: str, extra: str) -> str:
    """Its version, or why it cannot be imported."""
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"not installed (pip install 'univigu-engine[{extra}]')"
        return f"broken: {anonymous(error)}"
    except Exception as error:  # what a binary built for another torch raises is not foreseeable
        return f"broken: {type(error).__name__}: {anonymous(error)}"
    return getattr(found, "__version__", None) or metadata.version(module)


def compiled_kernels() -> str:
    """What univigu_kernels._C was built for, or why there is none."""
    try:
        from univigu_kernels import _compiled
    except RuntimeError as error:  # built for another torch: the text says how to rebuild
        return f"broken: {anonymous(error)}"
    if not _compiled.built():
        return _compiled.missing("cpu")
    info = _compiled.build_info()
    cuda = info["cuda_architectures"] or "none"
    sets = f"{info['instruction_set']} of {', '.join(info['instruction_sets'])}"
    return f"CPU: {sets}; CUDA: {cuda}; built for torch {info['torch']}, gcc {info['compiler']}"


def backends() -> dict[str, str]:
    """The table of chosen and rejected backends, by device and dtype."""
    import torch

    kinds = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    kinds += [("cuda", torch.bfloat16)] if torch.cuda.is_available() else []
    tables = {}
    for device, dtype in kinds:
        try:
            from univigu_kernels import explain

            table = without_folders(explain(device=device, dtype=dtype))
        except (ValueError, ImportError, RuntimeError) as error:  # a bad request, a broken build
            table = f"none: {anonymous(error)}"
        tables[f"{device} {str(dtype).removeprefix('torch.')}"] = table
    return tables


def anonymous(text: object) -> str:
    """One line without the folders of the installation and of the user."""
    return without_folders(" ".join(str(text).split()))


def without_folders(text: str) -> str:
    for folder, name in ((sys.prefix, "<python>"), (sys.base_prefix, "<python>")):
        text = text.replace(folder, name)
    home = str(Path.home())
    return text.replace(home, "~") if home != "/" else text


def format_report(report: dict) -> str:
    """`collect()` for a terminal."""
    processor, build = report["cpu"], report["torch"]
    sets = ", ".join(processor["instruction sets"]) or "none of " + ", ".join(INSTRUCTIONS)
    rows = [
        ("univigu", report["engine"]),
        ("system", report["system"]),
        ("python", report["python"]),
        ("cpu", processor["name"]),
        ("", sets),
        ("", f"{processor['cores usable']} of {processor['cores']} cores usable"),
        ("memory", f"{processor['memory GiB']} GiB" if processor["memory GiB"] else "unknown"),
        ("torch", f"{build['version']}, CUDA build {build['CUDA build']}"),
        ("", f"{build['threads']} threads"),
        ("driver", report["driver"]),
    ]

    for device in build["devices"]:
        size = f"{device['memory GiB']} GiB"
        rows.append(("device", f"{device['name']}, sm {device['compute capability']}, {size}"))
    if not build["devices"]:
        rows.append(("device", "cpu alone"))
    rows += report["packages"].items()
    rows.append(("compiled kernels", report["compiled kernels"]))

    lines = [f"{name:<18}{value}" for name, value in rows]
    for kind, table in report["kernels"].items():
        lines += ["", f"kernels on {kind}", table]
    return "\n".join(lines)
