#!/usr/bin/env bash
# Runs tests/vllm against the real vLLM 0.10.0: its Python sources from the released wheel, without its compiled part.
# Makes .venv-vllm on top of .venv once (torch and triton are .venv's), then runs pytest there; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/../.."
env=.venv-vllm
version=0.10.0
# What vLLM's Python imports on a CPU beside torch, from its requirements/common.txt.
needs=(blake3 cachetools cbor2 cloudpickle gguf msgspec pillow psutil pybase64 pydantic pyzmq regex requests tqdm
       transformers==5.17.0)

if [ ! -x .venv/bin/python ]; then
    echo "tests/vllm/run.sh: there is no .venv to build on; run 'make test' first" >&2
    exit 1
fi
if [ ! -e "$env/complete-$version" ]; then
    rm -rf "$env"
    .venv/bin/python -m venv "$env"
    echo '*' > "$env/.gitignore"
    base=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
    # Unlike a path alone, addsitedir also follows .venv's editable installs.
    echo "import site; site.addsitedir('$base')" > "$site/base.pth"
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check "${needs[@]}"
    # It pins an older transformers than the one above.
    "$env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps compressed-tensors==0.10.2
    "$env/bin/python" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$env" "vllm==$version"
    "$env/bin/python" - "$env"/vllm-"$version"*.whl "$site" <<'PYTHON'
import sys
import zipfile

wheel, site = sys.argv[1:]
with zipfile.ZipFile(wheel) as archive:
    archive.extractall(site, [n for n in archive.namelist() if not n.endswith((".so", "RECORD"))])
PYTHON
    rm "$env"/vllm-"$version"*.whl
    touch "$env/complete-$version"
fi
export PYTHONPATH="tests/vllm/plugin${PYTHONPATH:+:$PYTHONPATH}" TRITON_INTERPRET=1
export VLLM_USE_V1=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-WARNING}"
exec "$env/bin/python" -m pytest tests/vllm "$@"
