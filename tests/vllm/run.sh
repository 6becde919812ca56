#!/usr/bin/env bash
# Runs tests/vllm against the real vLLM of both generations, 0.10.0 and 0.22.1: the Python sources of the released wheels,
# without their compiled parts. Makes .venv-vllm-VERSION on top of .venv once for each (torch and triton are .venv's), then
# runs pytest there; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."

# What vLLM's Python imports on a CPU beside torch, from its requirements/common.txt.
common=(blake3 cachetools cbor2 cloudpickle gguf msgspec pillow psutil pybase64 pydantic pyzmq regex requests tqdm
        transformers==5.17.0)
newer=(aiohttp depyf distro einops fastapi lark loguru openai openai-harmony partial-json-parser prometheus-client
       py-cpuinfo python-json-logger sniffio uvloop)

# environment VERSION COMPRESSED_TENSORS PACKAGE...
environment() {
    local version=$1 tensors=$2 env=.venv-vllm-$1 base site
    shift 2
    if [ -e "$env/complete" ]; then
        return
    fi
    rm -rf "$env"
    .venv/bin/python -m venv "$env"
    echo '*' > "$env/.gitignore"
    base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # Unlike a path alone, addsitedir also follows .venv's editable installs.
    echo "import site; site.addsitedir('$base')" > "$site/base.pth"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
    # It pins another transformers than the one above.
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "compressed-tensors==$tensors"
    "$env/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$env" "vllm==$version"
    "$env/bin/python" - "$env"/vllm-"$version"*.whl "$site" <<'PYTHON'
import sys
import zipfile

wheel, site = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site, [n for n in archive.namelist() if not n.endswith((".so", "RECORD", "vllm-rs"))])
PYTHON
    rm "$env"/vllm-"$version"*.whl
    touch "$env/complete"
}

if [ ! -x .venv/bin/python ]; then
    echo "tests/vllm/run.sh: there is no .venv to build on; run 'make test' first" >&2
    exit 1
fi
environment 0.10.0 0.10.2 "${common[@]}"
environment 0.22.1 0.15.0.1 "${common[@]}" "${newer[@]}"
path=${PYTHONPATH:+:$PYTHONPATH}
export TRITON_INTERPRET=1 VLLM_USE_V1=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
PYTHONPATH="tests/vllm/plugin$path" .venv-vllm-0.10.0/bin/python -m pytest tests/vllm/test_v010*.py "$@"
export VLLM_PLUGINS=platform022 VLLM_LOGGING_LEVEL=INFO
PYTHONPATH="tests/vllm/plugin022$path" .venv-vllm-0.22.1/bin/python -m pytest tests/vllm/test_v022.py "$@"
