.PHONY: demo test check clean

demo:  ## the main job, start to end, on the built-in world and model
	@scripts/setup core
	@.venv/bin/vitrail demo --out demo

test:  ## every test of the default suite
	@scripts/setup dev
	@.venv/bin/python -m pytest

check:  ## format, lint, types, tests
	@scripts/check

clean:
	rm -rf .venv demo
