"""An S3 server in a process of its own: moto, one request after the other.

moto's own server answers each request in a thread and looks at conditions without a lock, so two
writes under the same condition could both be done there. Must never: be taken for a store.
"""

import sys

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple


def main() -> None:
    """Serve on the loopback port that is the only argument, until killed."""
    app = DomainDispatcherApplication(create_backend_app)
    run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=False)


if __name__ == "__main__":
    main()
