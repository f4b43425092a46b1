"""What goes wrong in clusters, done to real processes while clients stream: tests that anyone can run.

pytest tests/e2e/faults                                   all of it
pytest tests/e2e/faults --reliability docs/reliability.md  and write the figures into the page
pytest tests/e2e/faults -k storm --soak 600               ten minutes of one fault after another
"""
