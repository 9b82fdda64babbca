from deepfast.train import main

raise SystemExit(main())
