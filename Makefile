# make demo: sets everything up, then trains SimCLR on digits with two workers, evaluates and draws (≈ 3.5 minutes on 2 cores)
# make quick: the tests that start no other process, while you work (1 to 2 minutes on 2 cores, after the set-up)
# make test: sets everything up, then ruff, pyright and the tests
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
  $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$p; break; }; done)
SYSTEM_PACKAGES := libopencv-dev libturbojpeg0-dev pkg-config g++ python3-dev python3-venv
TEST_PACKAGES := slurm-wlm munge
export KILOBATCH_CACHE ?= $(CURDIR)/.cache

.PHONY: demo demo-pipeline quick test test-all lint types bench setup system slurm clean
.DELETE_ON_ERROR:

demo: setup
	$(BIN)/kilobatch train demo --workers 2

# The same network from scratch on the same 72 labels comes last, to compare with.
demo-pipeline: setup
	$(BIN)/kilobatch pipeline simclr_v2_digits --scratch --workers 2

# Three processes, since some tests wait for others; spread as tests/conftest.py says; each computes with one thread.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

# Neither SLURM nor ruff nor pyright; tests/conftest.py stops each test that starts a process. Its last line is the time.
quick: setup
	$(PYTEST) --quick

test: setup slurm lint types
	$(PYTEST)

test-all: setup slurm lint types
	$(PYTEST) -m "slow or not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright

bench: setup
	$(BIN)/python -m pip install -q -c constraints.txt "lightly==1.6.0"
	$(BIN)/python -m benchmarks.nt_xent
	$(BIN)/python -m benchmarks.queue
	$(BIN)/python -m benchmarks.queue_memory
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.cached
	$(BIN)/python -m benchmarks.overhead --batch 128
	$(BIN)/python -m benchmarks.scaling

setup: $(VENV)/installed

# deepspeed and ffcv build from source against the torch and numpy that are already there: hence the order, and no isolation.
$(VENV)/installed: pyproject.toml constraints.txt | system
	@test -n "$(PYTHON)" || { echo "kilobatch needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -U pip setuptools wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch torchvision numba
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# Headers that ffcv's build needs. Installed when that is allowed, else the way out is printed.
system:
	@if pkg-config --exists opencv4 libturbojpeg 2>/dev/null && command -v g++ >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(SYSTEM_PACKAGES) >/dev/null; \
	else \
	  echo "kilobatch: ffcv needs the headers of OpenCV and libjpeg-turbo to build. Install them, then run make again:" >&2; \
	  echo "  Debian, Ubuntu:     sudo apt-get install $(SYSTEM_PACKAGES)" >&2; \
	  echo "  without root:       conda install -c conda-forge opencv libjpeg-turbo pkg-config compilers" >&2; \
	  exit 2; \
	fi

# A real SLURM for tests/slurm, which start it themselves, with ports and folders of its own. Installed when that is
# allowed; else those tests are skipped, and say so (with CI=true they fail).
slurm:
	@command -v slurmctld >/dev/null || [ -x /usr/sbin/slurmctld ] || { [ "$$(id -u)" = 0 ] && apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(TEST_PACKAGES) >/dev/null; } || \
	  echo "kilobatch: no SLURM here, and its tests are skipped; to run them: sudo apt-get install $(TEST_PACKAGES)" >&2

clean:
	rm -rf $(VENV) build *.egg-info .cache
