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
