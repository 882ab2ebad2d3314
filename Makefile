# make demo: see it work      make test: check everything      make lab: open the notebooks
BIN := .venv/bin
NBS := $(sort $(wildcard nbs/[0-9]*/*.ipynb))
RUN := OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH"
QUICK := tests/test_nbs.py tests/test_layers.py tests/test_readme.py

.PHONY: help demo test lab export format notebooks readme docs clean distclean
help:
	@echo "make demo | test | lab | export | format | notebooks | readme | docs | clean | distclean"

# everything needed, in .venv; done again only when the pins or the settings change
.venv/.ready: constraints.txt settings.ini setup.py tools/setup.sh
	@sh tools/setup.sh

demo: .venv/.ready  ## fonts, text, line images, a short training, a page read and scored, a report
	@$(BIN)/python tools/demo.py

test: .venv/.ready  ## ruff, package = notebooks, layers, README, every notebook runs, pytest
	$(BIN)/ruff check khmer_ocr nbs tests tools setup.py
	$(BIN)/python -m pytest -q $(QUICK)
	$(RUN) $(BIN)/nbdev_test --n_workers 2
	$(RUN) $(BIN)/python -m pytest -q tests $(addprefix --ignore ,$(QUICK))

lab: .venv/.ready  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir .

export: .venv/.ready  ## notebooks -> package
	$(BIN)/python tools/export.py
	$(BIN)/nbdev_clean

format: .venv/.ready  ## ruff format over notebooks, tests and tools, then export
	$(BIN)/ruff format nbs tests tools setup.py
	$(MAKE) export

notebooks: .venv/.ready  ## run every notebook again, with fresh outputs, export, clean, README
	$(RUN) $(BIN)/python tools/refresh.py $(NBS)
	$(MAKE) export readme

readme: .venv/.ready  ## README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: .venv/.ready  ## notebooks and API reference as static pages: _docs/index.html
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	    $$(sed -n '/^docs_requirements/,/^[a-z]/{/^\t/p}' settings.ini)
	$(BIN)/python tools/docs.py

clean:  ## what tests and builds leave behind
	rm -rf _proc _docs _docs_src _mkdocs.json build dist .pytest_cache .ruff_cache reports/demo
	find nbs khmer_ocr tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean  ## also .venv and everything fetched or generated
	rm -rf .venv *.egg-info data/cache data/processed data/synthetic data/validation_fixed fonts/files models runs logs
