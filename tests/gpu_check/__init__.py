"""Everything that has to be seen on a GPU, by one command: `make gpu-check`.

`__main__.py` runs sections in processes of their own and keeps what they found after each;
`sections.py` lists them; `report.py` makes docs/measurements/gpu.md of it; `pack.sh` and `start.sh`
bring the command to a machine that has PyTorch and nothing of ours.
"""
