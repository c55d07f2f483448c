"""A machine that executes PTX on the CPU: `machine.load` reads a kernel, `Kernel.run` executes it and finds faults."""
