import sys

from cuqwen.cli import main

sys.exit(main())
