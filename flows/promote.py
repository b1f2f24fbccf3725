from flows.aliases import *  # noqa
