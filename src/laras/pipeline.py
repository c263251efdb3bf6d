"""One function a stage; the command line, the notebook and the Python API all call these."""
