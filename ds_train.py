#!/usr/bin/env python3
from deepfast.train import main

raise SystemExit(main())
