#!/usr/bin/env bash
# The project's checks: a .venv if there is none, ruff, the contract of imports, pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/common.sh
make_empty_venv
make_uv
# Side by side: each downloads, unpacks and waits by turns. What cannot be had of the last two is
# said, and their tests are skipped.
make_newest_triton & make_vllm & make_venv "[test]"
wait
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/lint-imports --no-logo
# Two files at a time: many tests wait for processes of their own. In the order of tests/conftest.py.
.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
