#!/usr/bin/env bash
# Data, training (interrupted once, and resumed), test, picture. From the root of the repository, with the extras train
# and motion installed.
set -euo pipefail
rm -rf data/motion runs/motion
python -m examples.motion.make_clips data/motion
config=examples/motion/config.yaml
timeout --foreground --signal=INT 40 python -m amflow_models.train --config $config || [ $? = 124 ]  # Ctrl-C after 40 seconds
python -m amflow_models.train --config $config --resume
python -m amflow_models.evaluate --config $config
python -m examples.motion.draw --config $config runs/motion/flow.png
