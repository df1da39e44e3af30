package api

import (
	"encoding/json"
	"testing"
)

func TestSetDefaults(t *testing.T) {
	for _, tt := range []struct {
		name     string
		k        *Kind
		in, want string
	}{
		{"service", Services,
			`{"metadata":{"name":"hello"},"spec":{"template":{"spec":{"containers":[{"image":"a","ports":[{"name":"h2c"}]}]}}}}`,
			`{"kind":"Service","apiVersion":"serving.knative.dev/v1","metadata":{"name":"hello"},"spec":{"template":{"spec":{"containers":[{"name":"user-container","image":"a","ports":[{"name":"h2c","protocol":"TCP"}],"readinessProbe":{"tcpSocket":{},"successThreshold":1}}],"containerConcurrency":0,"timeoutSeconds":300,"enableServiceLinks":false}},"traffic":[{"latestRevision":true,"percent":100}]}}`},
		{"nothing given is overwritten", Services,
			`{"metadata":{"name":"hello"},"spec":{"template":{"spec":{"containers":[{"name":"x","image":"a","readinessProbe":{"httpGet":{"path":"/"},"successThreshold":2}}],"containerConcurrency":5,"timeoutSeconds":30,"idleTimeoutSeconds":4,"enableServiceLinks":true}},"traffic":[{"revisionName":"hello-00001","percent":100},{"tag":"t"}]}}`,
			`{"kind":"Service","apiVersion":"serving.knative.dev/v1","metadata":{"name":"hello"},"spec":{"template":{"spec":{"containers":[{"name":"x","image":"a","readinessProbe":{"httpGet":{"path":"/"},"successThreshold":2}}],"containerConcurrency":5,"timeoutSeconds":30,"idleTimeoutSeconds":4,"enableServiceLinks":true}},"traffic":[{"revisionName":"hello-00001","latestRevision":false,"percent":100},{"tag":"t","latestRevision":true,"percent":0}]}}`},
		{"timeoutSeconds 0 is no limit of 0", Configurations,
			`{"metadata":{"name":"hello"},"spec":{"template":{"spec":{"containers":[],"timeoutSeconds":0}}}}`,
			`{"kind":"Configuration","apiVersion":"serving.knative.dev/v1","metadata":{"name":"hello"},"spec":{"template":{"spec":{"containers":null,"containerConcurrency":0,"timeoutSeconds":300,"enableServiceLinks":false}}}}`},
		{"response start over 300", Revisions,
			`{"metadata":{"name":"r"},"spec":{"containers":[],"timeoutSeconds":301}}`,
			`{"kind":"Revision","apiVersion":"serving.knative.dev/v1","metadata":{"name":"r"},"spec":{"containers":null,"containerConcurrency":0,"timeoutSeconds":301,"responseStartTimeoutSeconds":300,"enableServiceLinks":false}}`},
		{"response start at 300", Revisions,
			`{"metadata":{"name":"r"},"spec":{"containers":[],"timeoutSeconds":300}}`,
			`{"kind":"Revision","apiVersion":"serving.knative.dev/v1","metadata":{"name":"r"},"spec":{"containers":null,"containerConcurrency":0,"timeoutSeconds":300,"enableServiceLinks":false}}`},
		{"several containers", Revisions,
			`{"metadata":{"name":"r"},"spec":{"containers":[{"image":"a"},{"name":"user-container-1","image":"b","ports":[{"containerPort":1}]},{"image":"c"}]}}`,
			`{"kind":"Revision","apiVersion":"serving.knative.dev/v1","metadata":{"name":"r"},"spec":{"containers":[{"name":"user-container-0","image":"a"},{"name":"user-container-1","image":"b","ports":[{"containerPort":1,"protocol":"TCP"}],"readinessProbe":{"tcpSocket":{},"successThreshold":1}},{"name":"user-container-2","image":"c"}],"containerConcurrency":0,"timeoutSeconds":300,"enableServiceLinks":false}}`},
		{"probe with a period", Revisions,
			`{"metadata":{"name":"r"},"spec":{"containers":[{"image":"a","readinessProbe":{"periodSeconds":5},"livenessProbe":{"httpGet":{}}}]}}`,
			`{"kind":"Revision","apiVersion":"serving.knative.dev/v1","metadata":{"name":"r"},"spec":{"containers":[{"name":"user-container","image":"a","livenessProbe":{"httpGet":{}},"readinessProbe":{"tcpSocket":{},"timeoutSeconds":1,"periodSeconds":5,"successThreshold":1,"failureThreshold":3}}],"containerConcurrency":0,"timeoutSeconds":300,"enableServiceLinks":false}}`},
		{"a route has no default target", Routes,
			`{"metadata":{"name":"r"},"spec":{"traffic":[{"configurationName":"c","percent":100}]}}`,
			`{"kind":"Route","apiVersion":"serving.knative.dev/v1","metadata":{"name":"r"},"spec":{"traffic":[{"configurationName":"c","latestRevision":true,"percent":100}]}}`},
		{"empty route", Routes, `{"metadata":{"name":"r"}}`, `{"kind":"Route","apiVersion":"serving.knative.dev/v1","metadata":{"name":"r"}}`},
		{"domain mapping", DomainMappings,
			`{"metadata":{"name":"a.b","namespace":"n"},"spec":{"ref":{"name":"x"}}}`,
			`{"kind":"DomainMapping","apiVersion":"serving.knative.dev/v1beta1","metadata":{"name":"a.b","namespace":"n"},"spec":{"ref":{"namespace":"n","name":"x"}}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, _, err := Decode(tt.k, []byte(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			for range 2 { // the second time changes nothing
				SetDefaults(o)
				got, err := json.Marshal(o)
				if err != nil || string(got) != tt.want {
					t.Errorf("got  %s %v\nwant %s", got, err, tt.want)
				}
			}
		})
	}
}
