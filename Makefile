# make demo: see it work      make test: check everything      make lab: open the notebooks
BIN := .venv/bin
NBS := $(wildcard nbs/*.ipynb)

.PHONY: help demo test lab notebooks readme clean distclean
help:
	@echo "make demo | test | lab | notebooks | readme | clean | distclean"

# everything needed, in .venv; done again only when the pins or the settings change
.venv/.ready: constraints.txt settings.ini setup.py tools/setup.sh
	@sh tools/setup.sh

demo: .venv/.ready  ## fonts, text, line images, a short training, a page read and scored, a report
	@$(BIN)/python tools/demo.py

test: .venv/.ready  ## package = notebooks, notebooks clean, layers, README, every notebook runs, pytest
	$(BIN)/python -m pytest -q tests/test_nbs.py tests/test_layers.py tests/test_readme.py
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -q tests --ignore tests/test_nbs.py --ignore tests/test_layers.py --ignore tests/test_readme.py

lab: .venv/.ready  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir .

notebooks: .venv/.ready  ## run every notebook again, with fresh outputs, export, clean, README
	OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tools/refresh.py $(NBS)
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	$(BIN)/python tools/readme.py

readme: .venv/.ready  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

clean:  ## what tests and builds leave behind
	rm -rf _proc _docs build dist .pytest_cache reports/demo
	find nbs khmer_ocr tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean  ## also .venv and everything fetched or generated
	rm -rf .venv *.egg-info data/cache data/processed data/synthetic data/validation_fixed fonts/files models runs logs
