#!/bin/sh
# Make .venv with the pinned packages and this project in it. Called by make; PYTHON=... chooses the Python.
set -e
cd "$(dirname "$0")/.."
stop() { echo "set-up: $*" >&2; exit 1; }

good() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
for python in ${PYTHON:-.venv/bin/python python3 python3.11 python3.12 python3.13}; do
    if good "$python"; then found=$python; break; fi
done
[ -n "$found" ] || stop "Python 3.11 or newer is needed, ${PYTHON:-python3} is $(${PYTHON:-python3} -V 2>/dev/null || echo missing): install it, or name one with make PYTHON=/path/to/python3"
if ! good .venv/bin/python; then
    "$found" -c 'import venv, ensurepip' 2>/dev/null || stop "Python's venv module is missing: on Debian and Ubuntu run 'apt install python3-venv'"
    rm -rf .venv
    echo "set-up: making .venv with $("$found" -V)"
    "$found" -m venv .venv || stop "could not make .venv with $found"
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
wanted() { .venv/bin/python -c "from configparser import ConfigParser as C; c = C(delimiters=['=']); c.read('settings.ini', encoding='utf-8'); d = c['DEFAULT']; print(d['requirements'], d['dev_requirements'], d['onnx_requirements'])"; }
pin() { sed -n "s/^$1==//p" constraints.txt; }
echo "set-up: installing the packages of constraints.txt (some minutes the first time)"
pip install -qq -c constraints.txt --upgrade pip setuptools wheel   # older pips misread some constraints
pip install -qq -c constraints.txt "torch==$(pin torch)"   # first and alone: nothing after it may choose another
# shellcheck disable=SC2046
pip install -qq -c constraints.txt $(wanted)
if ! .venv/bin/python -c 'import cv2' 2>/dev/null; then
    echo "set-up: opencv-python does not load here (it wants libGL): taking opencv-python-headless of the same version"
    pip uninstall -qq -y opencv-python opencv-python-headless
    pip install -qq -c constraints.txt "opencv-python-headless==$(pin opencv-python)"
    .venv/bin/python -c 'import cv2' || stop "OpenCV does not load"
fi
pip install -qq --no-build-isolation --no-deps -e . --config-settings editable_mode=compat 2>.venv/editable.log || { cat .venv/editable.log >&2; stop "could not install the project"; }
touch .venv/.ready
echo "set-up: done"
