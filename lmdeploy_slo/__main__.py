"""`python -m lmdeploy_slo`: the command line."""

from lmdeploy_slo.cli.main import main

if __name__ == "__main__":
    main()
