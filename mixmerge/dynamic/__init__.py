"""Networks whose weights depend on the input: a base, a bank of experts' changes, and a gate that mixes them.

``model.DynamicModel`` is what Python sees, ``engine.DynamicEngine`` what answers for ``batch``, ``ask`` and ``eval``;
``tasks.TaskModel`` is a base that becomes the model of one task at a time, ``task_engine.TaskEngine`` its engine.
``folders`` says what of them lies in which folder.
"""
