# Sourced by tools/demo and tools/test: puts lwc and what it needs into a virtual environment.
# An active environment is used as it is; otherwise .venv is made beside the project.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

if [ -z "${VIRTUAL_ENV:-}" ]; then
  base=${PYTHON:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "lwc needs Python 3.11 or newer; $base is $("$base" --version)" >&2
    exit 2
  }
  [ -x .venv/bin/python ] || "$base" -m venv .venv
  VIRTUAL_ENV=$root/.venv
fi
python=$VIRTUAL_ENV/bin/python
export VIRTUAL_ENV PATH="$VIRTUAL_ENV/bin:$PATH" PIP_DISABLE_PIP_VERSION_CHECK=1

# install EXTRAS: once per state of pyproject.toml, the C++ sources and set of extras. CPU PyTorch comes first, because a
# later package that asks for just "torch" would bring the CUDA build.
install() {
  local stamp
  stamp="$VIRTUAL_ENV/.lwc-$(printf '%s\n' "$1" "$root" | cat - pyproject.toml backends/onnxruntime/native/* | sha256sum | cut -c1-16)"
  [ -e "$stamp" ] && return
  echo "installing lwc[$1] into $VIRTUAL_ENV"
  "$python" -m pip install --quiet torch==2.13.0
  "$python" -m pip install --quiet --editable ".[$1]"
  touch "$stamp"
}
