BEGIN TRANSACTION;
CREATE TABLE meta (
	name VARCHAR NOT NULL, 
	value INTEGER NOT NULL, 
	PRIMARY KEY (name)
);
INSERT INTO "meta" VALUES('schema',1);
INSERT INTO "meta" VALUES('epoch',3);
CREATE TABLE models (
	alias VARCHAR NOT NULL, 
	spec JSON NOT NULL, 
	created INTEGER NOT NULL, 
	PRIMARY KEY (alias)
);
INSERT INTO "models" VALUES('org/a','{"alias": "org/a", "model_name": "org/model", "max_model_len": 4096, "gpu_memory_gb": 7.5, "engine_args": {"dtype": "bfloat16"}}',1700000001);
INSERT INTO "models" VALUES('b','{"alias": "b", "engine": "fake", "min_replicas": 2, "fake": true, "fake_response": "hi"}',1700000002);
CREATE TABLE workers (
	worker_id VARCHAR NOT NULL, 
	url VARCHAR NOT NULL, 
	PRIMARY KEY (worker_id)
);
INSERT INTO "workers" VALUES('w1','http://10.0.0.1:7000');
COMMIT;
