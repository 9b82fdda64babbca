#!/usr/bin/env python3
try:
    from deepfast.train import main

    code = main()
except KeyboardInterrupt:
    code = 130
raise SystemExit(code)
