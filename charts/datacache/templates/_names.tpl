{{- define "datacache.labels" -}}
app.kubernetes.io/name: datacache
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "datacache.image" -}}
{{- $why := "image.repository: '' will not do; expected the image of controller and workers, such as registry.example/datacache (or controller.enabled=false for the kinds only)" -}}
{{ required $why .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* The secrets to pull the image with, as a field of a pod. */ -}}
{{- define "datacache.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- /* The driver's DaemonSet, which the controller rolls; empty where there is none. */ -}}
{{- define "datacache.plugin" -}}
{{- if .Values.csi.enabled }}datacache-csi{{ end }}
{{- end }}

{{- /* Directories of the nodes that the driver works in, without those that lie in another: a list. */ -}}
{{- define "datacache.directories" -}}
{{- $nodes := .Values.nodes }}
{{- $all := concat (list .Values.kubeletDir $nodes.stateDir $nodes.runDir $nodes.memoryDir $nodes.diskDir) .Values.tiers.roots | uniq }}
{{- $found := list }}
{{- range $one := $all }}
{{- $inside := false }}
{{- range $other := $all }}
{{- if hasPrefix (printf "%s/" $other) $one }}{{ $inside = true }}{{ end }}
{{- end }}
{{- if not $inside }}{{ $found = append $found $one }}{{ end }}
{{- end }}
{{- toJson $found }}
{{- end }}
