"""The HTTP API of a node: OpenAI's shapes in front of an EngineClient. create_app in api.py, HttpServer in http.py."""
