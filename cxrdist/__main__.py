import signal
import sys


def run() -> None:
    """Run the command line of this process."""
    # Until the command handles it, Ctrl-C must not show where the imports below are. A shell that
    # ignores it, such as for `&` in a script, has its reasons.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from cxrdist.cli import main, open_closed_streams
    from cxrdist.launch import main as launch
    from cxrdist.lifetime import exit_with

    open_closed_streams()
    # Not through cli.main, whose watch of signals would end the launcher UNHEARD_SECONDS
    # after a stop request, while its ranks still save.
    if sys.argv[1:2] == ["launch"]:
        sys.exit(launch(sys.argv[2:]))
    exit_with(main)


if __name__ == "__main__":
    run()
