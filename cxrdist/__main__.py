from cxrdist.cli import main
from cxrdist.lifetime import exit_with


def run() -> None:
    """Run the command line of this process."""
    exit_with(main)


if __name__ == "__main__":
    run()
