"""Image-text pairs in, webdataset tars with an index and a manifest out. Imports neither torch nor trainer.

python -m data_tools --help
"""
